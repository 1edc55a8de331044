"""Lower: an accepted candidate becomes what its scheme computes; by default a quantisation and an
int8 linear.

Before::

    y = F.linear(x, weight, bias)

After::

    x_int8, x_scale, x_outlier, outlier_columns = int8fx.quantize(x, 6.0, "column")
    y = int8fx.int8_linear(x_int8, x_scale, x_outlier, outlier_columns, w_packed, w_scale, bias)

``quantize`` is decomposed into aten after autograd, for Inductor to fuse with what produced ``x``;
``int8_linear`` stays one call. With threshold 0 there are no outliers, and ``x`` itself stands in for
``x_outlier``: it carries the dtype and the gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.kernels.ops.int8_matmul import int8_matmul
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.values import is_dense
from int8fx.passes.linears.canonicalize import Candidate
from int8fx.passes.linears.experts import emit_experts

# (call, x, tensors of the weight, bias) -> y, all of them nodes; ``kernels/schemes/scheme.py`` has the
# schemes'
Product = Callable[[Callable[..., Any], fx.Node, Sequence[fx.Node], fx.Node | None], fx.Node]


def lower(candidate: Candidate, weight: Sequence[fx.Node], product: Product, fake_mode: Any) -> fx.Node:
    """Rewrites one candidate in place; returns the node that takes its place.

    Args:
        weight: the parts of its packed weight, placeholders of the outermost graph.
        product: emits ``y [*, N]`` of x's dtype from ``x [*, K]``.
    """
    node, graph = candidate.node, candidate.scope.graph
    assert candidate.x is not None
    weight = [candidate.scope.lift(part) for part in weight]
    output_dtype = node.meta["example_value"].dtype
    with graph.inserting_before(node):
        emit = Emitter(graph, fake_mode, node)
        x = _as_dtype(emit, candidate.x, output_dtype)
        x = emit.steps(x, candidate.x_steps)
        if candidate.routing is None:
            y = product(emit.call, x, weight, candidate.bias)
        else:
            y = emit_experts(emit, x, candidate.routing, weight, product)
        y = emit.steps(y, candidate.y_steps)
        if candidate.addend is not None:
            y = emit.call(torch.add, y, _as_dtype(emit, candidate.addend, output_dtype))
        y = _laid_out_as(emit, y, node.meta["example_value"])
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return y


def lower_matmul(candidate: Candidate, fake_mode: Any) -> fx.Node:
    """``left @ right`` of two activations to ``int8fx.int8_matmul(left, right)``, in place."""
    node, graph = candidate.node, candidate.scope.graph
    assert candidate.factors is not None
    output_dtype = node.meta["example_value"].dtype
    with graph.inserting_before(node):
        emit = Emitter(graph, fake_mode, node)
        y = emit.call(int8_matmul, *(_as_dtype(emit, each, output_dtype) for each in candidate.factors))
        y = _laid_out_as(emit, y, node.meta["example_value"])
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return y


def _laid_out_as(emit: Emitter, y: fx.Node, eager: Tensor) -> fx.Node:
    """The same values in memory as eager has them: a later ``view()`` may rely on it."""
    order = eager.dim_order()
    if not is_dense(eager, order) or is_dense(y.meta["example_value"], order):
        return y
    if order == tuple(range(len(order))):
        return emit.method("contiguous", y)
    dense = emit.method("contiguous", emit.method("permute", y, order))
    return emit.method("permute", dense, tuple(map(order.index, range(len(order)))))


def _as_dtype(emit: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast a linear reads fp32 and answers bf16: the cast is made explicit."""
    if node.meta["example_value"].dtype == dtype:
        return node
    return emit.method("to", node, dtype)
