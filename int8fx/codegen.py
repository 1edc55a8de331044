"""The last steps of a compile: Inductor on the rewritten graph, behind the swap of its weights."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from int8fx import torch_private
from int8fx.compilation import Compilation
from int8fx.kernels.schemes.table import SCHEMES
from int8fx.kernels.tuning import tuning
from int8fx.passes import bitsandbytes_nodes
from int8fx.passes.unlist_linears import unlist_linears
from int8fx.passes.weight_expression import is_view_or_cast
from int8fx.quantize import local
from int8fx.quantized_weight import Int8Weight
from int8fx.weights import WeightSwap

# What Inductor is given to fuse instead of a call; see passes/lower.py.
DECOMPOSITIONS = {
    operator: decomposed
    for scheme in SCHEMES.values()
    for operator, decomposed in scheme.decompositions.items()
}


_ON_A_GPU = {
    f"int8fx.{name}.default" for name in ("quantized_linears", "normed_linears", "expert_linear_gpu")
}
WHOLE_ROW = 8192  # elements that Inductor reduces in one launch, however few rows there are


def codegen(compilation: Compilation, patches: dict[str, Any]) -> Callable[..., Any]:
    """AOTAutograd and Inductor on the rewritten graph, behind the swap of its weights.

    Args:
        patches: Inductor's configuration.
    """
    if torch_private.writes_cpp_wrapper(patches):
        for scope in compilation.root.walk():
            unlist_linears(scope.graph, compilation.fake_mode)
    swap, kept = finish_inputs(compilation)
    examples = [compilation.inputs[position] for position in kept]
    examples += map(torch_private.as_static_input, swap.packed(compilation.inputs))
    with tuning(torch_private.tunes(patches)):
        compiled = torch_private.compile_with_inductor(
            compilation.root.gm,
            examples,
            _whole_rows(compilation) | patches,
            DECOMPOSITIONS,
            cache_identity() + _int8_shards(examples),
        )
    if not compilation.slots:
        return compiled
    if not compilation.needs_autograd:
        compiled = torch_private.below_autograd(compiled)
    return behind(swap, compiled)


def _whole_rows(compilation: Compilation) -> dict[str, Any]:
    """What keeps the quantisation of a row in the kernel that computes it, on a GPU.

    Inductor splits a reduction where rows are few and longer than WHOLE_ROW, as in front of
    Llama-3-8B's down_proj: a row's absmax would be two launches, and what it scales a third. The
    setting is for a whole graph, so one with such a row pays for it in its other long reductions.
    """
    nodes = (node for scope in compilation.root.walk() for node in scope.graph.nodes)
    rows = [node.args[0].meta["example_value"] for node in nodes if str(node.target) in _ON_A_GPU]
    return {"split_reductions": False} if any(x.shape[-1] > WHOLE_ROW for x in rows) else {}


def _int8_shards(examples: Sequence[Any]) -> str:
    """Which inputs are distributed int8 weights: AOTAutograd's cache takes all DTensors of a shape and
    placement for the same, whatever they hold."""
    shards = [
        str(position)
        for position, example in enumerate(examples)
        if isinstance(example, Tensor)
        and not isinstance(example, Int8Weight)
        and isinstance(local(example), Int8Weight)
    ]
    return "-int8-shards-" + ",".join(shards) if shards else ""


def finish_inputs(compilation: Compilation) -> tuple[WeightSwap, list[int]]:
    """The swap of the graph's weights, and the positions of the inputs that it keeps as they are."""
    for scope in compilation.root.walk():
        # Views and casts of weights that nothing reads any more would run at every call.
        _drop_unused_views(scope.graph)
    kept = _kept_inputs(compilation)
    for scope in compilation.root.walk():
        scope.gm.recompile()
    compilation.swap = WeightSwap(compilation.slots, kept, compilation.store)
    return compilation.swap, kept


def behind(swap: WeightSwap, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A callable with the signature of the graph as Dynamo gave it."""

    def call(*args: Any) -> Any:
        torch_private.refuse_tangents(args)
        return compiled(*swap(args))

    return call


def _drop_unused_views(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and is_view_or_cast(node):
            graph.erase_node(node)


def _kept_inputs(compilation: Compilation) -> list[int]:
    """Erases weights that nothing reads any more; the positions of the inputs that stay."""
    swapped = {slot.position for slot in compilation.slots}
    kept = []
    for position, node in enumerate(compilation.placeholders):
        # bitsandbytes' int8 parameter comes beside the weight that its products read.
        kind = type(compilation.inputs[position]).__name__
        unread = position in swapped or kind == bitsandbytes_nodes.PARAMETER
        if unread and not node.users:
            compilation.root.graph.erase_node(node)
        else:
            kept.append(position)
    return kept


@functools.cache
def cache_identity() -> str:
    """A hash of this package's sources: part of the key of every compile cache below us."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    kernels = package / "kernels"
    folders = ("cpu", "gpu", "schemes")
    for folder in (package, package / "passes", kernels, *(kernels / name for name in folders)):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    return f"int8fx-{digest.hexdigest()[:16]}"
