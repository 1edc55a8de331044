"""Packed weights as inputs of the graph, and which of its own inputs it keeps."""

from collections.abc import Callable
from typing import Any

from torch import fx

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.swap import Slot, WeightSwap
from int8fx.passes.graph.weight_expression import is_view_or_cast
from int8fx.passes.linears import bitsandbytes_nodes
from int8fx.passes.linears.canonicalize import Candidate
from int8fx.weights.tensor import QuantizedWeight


def finish_inputs(compilation: Compilation) -> tuple[WeightSwap, list[int]]:
    """The swap of the graph's weights, and the positions of the inputs that it keeps as they are."""
    for scope in compilation.root.walk():
        # Views and casts of weights that nothing reads any more would run at every call.
        _drop_unused_views(scope.graph)
    kept = _kept_inputs(compilation)
    for scope in compilation.root.walk():
        scope.gm.recompile()
    compilation.swap = WeightSwap(
        compilation.slots, kept, compilation.store, compilation.options.check_weights
    )
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


def quantize_weights(compilation: Compilation) -> None:
    """Quantises each accepted weight, once, and makes its parts inputs of the graph."""
    for candidate in compilation.accepted:
        expression = candidate.weight
        if expression is None:
            continue
        key = packed_key(compilation, candidate)
        if key in compilation.packed_nodes:
            continue
        kept = compilation.choices[candidate].weight_format
        tensor = compilation.tensors[expression.placeholder]
        packed = compilation.store.get(tensor, expression, kept)
        position = compilation.placeholders.index(expression.placeholder)
        # Two recipes of one weight are two packed weights.
        name = f"{expression.placeholder.name}{len(compilation.slots)}_"
        compilation.slots.append(Slot(position, expression, kept, isinstance(tensor, QuantizedWeight)))
        compilation.packed.append(packed)
        compilation.packed_nodes[key] = [
            compilation.add_input(f"{name}{part}", value)
            for part, value in zip(kept.packed_names, packed.tensors, strict=True)
        ]


def packed_key(compilation: Compilation, candidate: Candidate) -> tuple[fx.Node, str, str]:
    """Candidates with one key share one packed weight."""
    assert candidate.weight is not None
    kept = compilation.choices[candidate].weight_format
    return candidate.weight.placeholder, candidate.weight.recipe, kept.name
