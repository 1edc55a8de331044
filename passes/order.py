"""The table of all passes, in the order in which they run.

``lower`` writes int8 linears into the graphs. The passes up to ``fuse_norms`` are about these; those
after it are about what stays in float, and about the wrapper that Inductor writes.
"""

from collections.abc import Callable

from int8fx.passes.contract import Context, Pass
from int8fx.passes.float.attend import attend_few_rows, attend_many_rows
from int8fx.passes.float.compute_once import compute_once
from int8fx.passes.float.group_heads import group_heads
from int8fx.passes.float.one_row import one_row
from int8fx.passes.graph.equal_lengths import equal_lengths
from int8fx.passes.graph.outline import outline
from int8fx.passes.int8.defer_split_k_reduction import defer_split_k_reduction
from int8fx.passes.int8.fold_biases import fold_biases
from int8fx.passes.int8.fuse_norms import fuse_norms
from int8fx.passes.int8.join_grouped import join_grouped
from int8fx.passes.int8.join_linears import join_linears
from int8fx.passes.int8.join_rotated import join_rotated
from int8fx.passes.int8.serve_experts import serve_experts
from int8fx.passes.int8.share_quantizations import share_quantizations
from int8fx.passes.int8.unlist_linears import unlist_linears
from int8fx.passes.linears.lower import lower


def compiled(context: Context) -> str:
    """Its gain is Inductor's: operator by operator there is none."""
    return "" if context.for_inductor else "the graph runs operator by operator"


def without_gradients(context: Context) -> str:
    """What it writes has no backward, or a slow one."""
    return "a gradient may be asked for" if context.needs_autograd else ""


def with_norms(context: Context) -> str:
    """A kernel of one of the devices takes a norm and its linears as one."""
    if any(context.joined(device) and context.normed(device) for device in context.devices):
        return ""
    return f"no operator of {' or '.join(context.devices)} takes a norm and its linears"


def in_cpp(context: Context) -> str:
    """It is about Inductor's wrapper in C++."""
    return "" if context.cpp_wrapper else "Inductor's wrapper is in Python"


def in_python(context: Context) -> str:
    """Inductor's wrapper in C++ calls no sub-graphs."""
    return "Inductor's wrapper is in C++" if context.cpp_wrapper else ""


def where(*conditions: Callable[[Context], str]) -> Callable[[Context], str]:
    """All of them hold; the first that does not gives the reason."""

    def applies(context: Context) -> str:
        return next((reason for each in conditions if (reason := each(context))), "")

    return applies


PASSES: tuple[Pass, ...] = (
    Pass("lower", lower),
    Pass("share_quantizations", share_quantizations),
    Pass("fold_biases", fold_biases),
    Pass("join_linears", join_linears),
    Pass("join_rotated", join_rotated),
    Pass("join_grouped", join_grouped),
    Pass("serve_experts", serve_experts),
    Pass("defer_split_k_reduction", defer_split_k_reduction),
    Pass("fuse_norms", fuse_norms, where(without_gradients, with_norms)),
    Pass("attend_few_rows", attend_few_rows, where(compiled, without_gradients)),
    Pass("group_heads", group_heads, compiled),
    Pass("attend_many_rows", attend_many_rows, where(compiled, without_gradients)),
    Pass("compute_once", compute_once, compiled),
    Pass("one_row", one_row, where(compiled, without_gradients)),
    Pass("unlist_linears", unlist_linears, where(compiled, in_cpp)),
    Pass("equal_lengths", equal_lengths, where(compiled, without_gradients, in_python)),
    Pass("outline", outline, where(compiled, without_gradients, in_python)),
)
