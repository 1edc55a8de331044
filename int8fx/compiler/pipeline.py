"""One compile, as ten named steps: from Dynamo's graph to a callable."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from int8fx.compiler.capture import capture
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.decide import canonicalize, select
from int8fx.compiler.foreign import replace_bitsandbytes
from int8fx.compiler.inductor import codegen
from int8fx.compiler.release import release
from int8fx.compiler.report import Report, publish
from int8fx.compiler.weight_inputs import behind, finish_inputs, packed_key, quantize_weights
from int8fx.kernels import table
from int8fx.kernels.schemes.table import quantizers
from int8fx.options import Options
from int8fx.passes.float.attend import attend_few, attend_many
from int8fx.passes.float.compute_once import compute_once
from int8fx.passes.float.group_heads import group_heads
from int8fx.passes.float.one_row import one_row
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.verify import Signature, verify
from int8fx.passes.int8.fuse_epilogue import fuse_epilogue
from int8fx.passes.int8.fuse_norms import fuse_norms
from int8fx.passes.int8.fuse_prologue import fuse_prologue
from int8fx.passes.int8.fuse_sums import fuse_sums
from int8fx.passes.int8.join_linears import join_linears
from int8fx.passes.int8.join_rotated import join_rotated
from int8fx.passes.int8.serve_experts import serve_experts
from int8fx.passes.linears.lower import lower, lower_matmul
from int8fx.weights.changes import watch as watch_changes
from int8fx.weights.store import WeightStore

log = logging.getLogger(__name__)


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any]
) -> Callable[..., Any]:
    """A callable with the graph's signature, its linears in int8.

    Args:
        gm: as Dynamo gives it to a backend; it is left as it is.
        inputs: the graph's inputs, parameters among them as real tensors.
        patches: Inductor's configuration.
    """
    compilation = capture(gm, inputs, options)
    canonicalize(compilation)
    select(compilation)
    if replace_bitsandbytes(compilation) or compilation.accepted:
        rewrite(compilation)
        speed_up_float(compilation)
        verify(compilation.root, compilation.signatures)
    compiled = codegen(compilation, patches)
    if options.release_weights:
        compilation.swap.replaced(release(compilation))
    report(compilation)
    return compiled


def rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    store: WeightStore,
    watch: Callable[[Compilation], None] = lambda compilation: None,
    runner: Callable[[fx.GraphModule], Callable[..., Any]] = lambda gm: gm,
) -> Callable[..., Any]:
    """The rewritten graph as it is before Inductor, to be run operator by operator.

    Args:
        store: keeps the packed weights: one that is not the process's own forgets them with it.
        watch: sees the compilation after ``select`` and may wrap products, see ``observe.py``.
        runner: how the rewritten graph is run.
    """
    compilation = capture(gm, inputs, options)
    compilation.store = store
    canonicalize(compilation)
    select(compilation)
    watch(compilation)
    rewrite(compilation)
    verify(compilation.root, compilation.signatures)
    swap, _ = finish_inputs(compilation)
    return behind(swap, runner(compilation.root.gm))


def rewrite(compilation: Compilation) -> None:
    """The steps that put int8 linears where ``select`` accepted them."""
    watch_changes()
    quantize_weights(compilation)
    lower_linears(compilation)
    share_quantizations(compilation)
    fold_biases(compilation)
    join_quantized_linears(compilation)
    join_rotated_linears(compilation)
    serve_expert_linears(compilation)
    leave_sums(compilation)
    move_norms(compilation)


def lower_linears(compilation: Compilation) -> None:
    """Rewrites each accepted candidate into what its scheme computes."""
    rewritten: dict[fx.Node, fx.Node] = {}
    for candidate in compilation.accepted:
        before = Signature.of(candidate.node)
        # An operand may be a candidate that has just been rewritten.
        candidate.rebind(rewritten)
        if candidate.weight is None:
            y = lower_matmul(candidate, compilation.fake_mode)
        else:
            weight = compilation.packed_nodes[packed_key(compilation, candidate)]
            product = compilation.products[candidate]
            y = lower(candidate, weight, product, compilation.fake_mode)
        rewritten[candidate.node] = y
        compilation.signatures.append((y, before, Signature.of(y)))


def share_quantizations(compilation: Compilation) -> None:
    """fuse_prologue on every graph."""
    memory = compilation.memory()  # a pass on one graph puts nothing into another
    for scope in compilation.root.walk():
        fuse_prologue(scope.graph, quantizers(), memory)


def fold_biases(compilation: Compilation) -> None:
    """fuse_epilogue on every graph."""
    memory = compilation.memory()
    for scope in compilation.root.walk():
        fuse_epilogue(scope.graph, memory)


def join_quantized_linears(compilation: Compilation) -> None:
    """join_linears on every graph; counts quantisations, which it may take away, before."""
    memory = compilation.memory()
    for scope in compilation.root.walk():
        for quantizer in quantizers():
            found = scope.graph.find_nodes(op="call_function", target=quantizer)
            compilation.quantizations += len(found)
        join_linears(scope.graph, compilation.fake_mode, table.joined, memory)


def join_rotated_linears(compilation: Compilation) -> None:
    """join_rotated on every graph."""
    memory = compilation.memory()
    for scope in compilation.root.walk():
        join_rotated(scope.graph, compilation.fake_mode, memory)


def serve_expert_linears(compilation: Compilation) -> None:
    """serve_experts on every graph."""
    for scope in compilation.root.walk():
        serve_experts(scope.graph, table.experts)


def leave_sums(compilation: Compilation) -> None:
    """fuse_sums on every graph."""
    for scope in compilation.root.walk():
        fuse_sums(scope.graph)


def move_norms(compilation: Compilation) -> None:
    """fuse_norms on every graph, where a kernel has an operator for it, which has no gradient."""
    if compilation.needs_autograd:
        return
    devices = {value.device.type for value in compilation.inputs if isinstance(value, Tensor)}
    for device in devices:
        joined, normed = table.joined(device), table.normed(device)
        if joined is None or normed is None:
            continue
        mode, memory = compilation.fake_mode, compilation.memory()
        graphs = (scope.graph for scope in compilation.root.walk())
        moved = sum(fuse_norms(graph, mode, joined[0], normed, memory) for graph in graphs)
        log.debug("%d norms into the operator of their linears", moved)


# What is left in float gets out of the way: what the log calls it, the pass, and when it applies.
InFloat = Callable[[fx.Graph, Any, Memory], int]
IN_FLOAT: tuple[tuple[str, InFloat, Callable[[Compilation], bool]], ...] = (
    (
        "attentions of few rows",
        attend_few,
        lambda compilation: table.attends("cpu", few=True) and not compilation.needs_autograd,
    ),
    ("attentions of decode by key heads", group_heads, lambda compilation: True),
    (
        "attentions of many rows by blocks",
        attend_many,
        lambda compilation: table.attends("cpu", few=False) and not compilation.needs_autograd,
    ),
    ("values that every layer reads, once", compute_once, lambda compilation: True),
    (
        "linears of one row as sums",
        lambda graph, fake_mode, _: one_row(graph, fake_mode),
        lambda compilation: not compilation.needs_autograd,
    ),
)


def speed_up_float(compilation: Compilation) -> None:
    """The passes of ``IN_FLOAT`` on every graph."""
    for what, run, applies in IN_FLOAT:
        if applies(compilation):
            mode, memory = compilation.fake_mode, compilation.memory()
            graphs = (scope.graph for scope in compilation.root.walk())
            log.debug("%d %s", sum(run(graph, mode, memory) for graph in graphs), what)


def report(compilation: Compilation) -> None:
    """Hands the decisions to whoever asked for them (``collect_reports``) and to the log."""
    made = Report(
        decisions=tuple(compilation.decisions),
        kernel=table.describe(),
        original=_readable(compilation.original),
        graph=_readable(compilation.root.gm),
        quantizations=compilation.quantizations,
        float_bytes=sum(weight.float_bytes for weight in compilation.packed),
        int8_bytes=sum(weight.nbytes for weight in compilation.packed),
        unused=compilation.options.unused([each.path for each in compilation.decisions]),
    )
    log.info("%s", made)
    publish(made)


def _readable(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)
