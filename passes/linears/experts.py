"""Mixtures of experts: products with one matrix of a batch ``[E, N, K]`` for each row.

Three spellings, all of transformers' among them, become one operator
(``kernels/ops/expert_linear.py``)::

    grouped_mm(x, w, offs)              rows come sorted by expert; offs [E] are their ends
    bmm(x.unsqueeze(1), w[experts])     an expert for each row; the float weight is copied for it
    bmm(x, w)                           x [E, M, K], each expert with its own rows

After::

    y = int8fx.expert_linear(x, 6.0, "column", w_packed, w_scale, None, offs)    for grouped_mm
    y = int8fx.expert_linear(x, 6.0, "column", w_packed, w_scale, experts, None)

Where a device has an operator of its own for it, ``serve_experts`` puts that in its place.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.passes.graph.emit import Emitter

_SELECTS = frozenset({torch.index_select, "index_select"})


@dataclass(frozen=True)
class Routing:
    """Which matrix of a batch ``[E, N, K]`` a row of the activation meets.

    Attributes:
        ends: grouped: ``[E]``, where the rows of each expert end; x is ``[S, K]``.
        index: otherwise x is ``[B, M, K]``, and this the matrix of each of the B: ``[B]``, or None:
            the first meets the first, and B = E.
    """

    ends: fx.Node | None = None
    index: fx.Node | None = None


def selected(node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """``(w, index, transposed)`` of a node that is ``w[index]`` or ``w[index].mT``, or None.

    The index is 1-D, of integers.
    """
    transposed = False
    while isinstance(node, fx.Node) and _swaps_matrix_dimensions(node):
        node, transposed = node.args[0], not transposed
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem or node.target == "__getitem__":
        weight, index = node.args
    elif node.target in _SELECTS and len(node.args) == 3 and node.args[1] == 0:
        weight, _, index = node.args
    else:
        return None
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(index, fx.Node) or not isinstance(weight, fx.Node):
        return None
    value = index.meta.get("example_value")
    integers = (torch.int64, torch.int32)
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in integers:
        return None
    return weight, index, transposed


def _swaps_matrix_dimensions(node: fx.Node) -> bool:
    """Whether a node transposes the matrices of a batch ``[B, *, *]``."""
    if node.target is torch.ops.aten.mT or (node.target is getattr and node.args[1] == "mT"):
        return True
    if node.target not in ("transpose", "swapaxes", "swapdims", torch.transpose):
        return False
    dims = [dim for dim in node.args[1:] if isinstance(dim, int)]
    return len(node.args) == 3 and {dim % 3 for dim in dims} == {1, 2}


def emit_experts(
    emit: Emitter,
    x: fx.Node,
    routing: Routing,
    weight: Sequence[fx.Node],
    product: Callable[..., fx.Node],
) -> fx.Node:
    """The calls that take the place of a routed product of ``x``; see the module's docstring.

    Args:
        product: ``(call, x [S, K], tensors of the weight, (experts, ends))`` to ``[S, N]``; one of
            ``experts [S]`` and ``ends [E]`` is None (``kernels/ops/expert_linear.py``).

    Returns:
        ``[S, N]`` where x is ``[S, K]`` (grouped), else ``[B, M, N]``.
    """
    if routing.ends is not None:
        return product(emit.call, x, weight, (None, routing.ends))
    B, M = emit.method("size", x, 0), emit.method("size", x, 1)
    rows = emit.method("flatten", x, 0, 1)
    experts = ends = None
    if routing.index is None:
        device = x.meta["example_value"].device
        matrices = emit.call(torch.arange, B, device=device)
        ends = emit.call(torch.mul, emit.call(torch.add, matrices, 1), M)
    else:
        experts = emit.call(torch.repeat_interleave, routing.index, M)
    y = product(emit.call, rows, weight, (experts, ends))
    return emit.method("unflatten", y, 0, (B, M))
