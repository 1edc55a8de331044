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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.kernels.ops.int8_matmul import int8_matmul
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.values import is_dense
from int8fx.passes.graph.verify import Signature
from int8fx.passes.linears.candidate import Accepted, Candidate, Product
from int8fx.passes.linears.experts import emit_experts


def lower(graph: fx.Graph, context: Context) -> Result:
    """Rewrites the accepted candidates of one graph, in place; changed: how many."""
    rewritten: dict[fx.Node, fx.Node] = {}
    for each in context.accepted:
        candidate = each.candidate
        if candidate.scope.graph is not graph:
            continue
        before = Signature.of(candidate.node)
        # An operand may be a candidate that has just been rewritten.
        candidate.rebind(rewritten)
        y = _lower(each, context.fake_mode)
        rewritten[candidate.node] = y
        context.signatures.append((y, before, Signature.of(y)))
    return Result(len(rewritten))


def _lower(accepted: Accepted, fake_mode: Any) -> fx.Node:
    """Rewrites one candidate; the node that takes its place."""
    node = accepted.candidate.node
    with node.graph.inserting_before(node):
        emit = Emitter(node.graph, fake_mode, node)
        if accepted.product is None:
            y = _matmul(emit, accepted.candidate)
        else:
            y = _linear(emit, accepted.candidate, accepted.weight, accepted.product)
        y = _laid_out_as(emit, y, node.meta["example_value"])
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)
    return y


def _linear(
    emit: Emitter, candidate: Candidate, weight: Sequence[fx.Node], product: Product
) -> fx.Node:
    assert candidate.x is not None
    weight = [candidate.scope.lift(part) for part in weight]
    output_dtype = candidate.node.meta["example_value"].dtype
    x = _as_dtype(emit, candidate.x, output_dtype)
    x = emit.steps(x, candidate.x_steps)
    if candidate.routing is None:
        y = product(emit.call, x, weight, candidate.bias)
    else:
        y = emit_experts(emit, x, candidate.routing, weight, product)
    y = emit.steps(y, candidate.y_steps)
    if candidate.addend is not None:
        y = emit.call(torch.add, y, _as_dtype(emit, candidate.addend, output_dtype))
    return y


def _matmul(emit: Emitter, candidate: Candidate) -> fx.Node:
    """``left @ right`` of two activations to ``int8fx.int8_matmul(left, right)``."""
    assert candidate.factors is not None
    output_dtype = candidate.node.meta["example_value"].dtype
    return emit.call(int8_matmul, *(_as_dtype(emit, each, output_dtype) for each in candidate.factors))


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
