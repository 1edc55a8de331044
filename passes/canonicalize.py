"""Canonicalize: every spelling of a linear map, as ``y = x @ weightᵀ + bias`` with weight ``[N, K]``.

    F.linear(x, w, b)                 x, w, b
    torch.addmm(b, x, w)              x, w.transpose(0, 1), b
    x @ w,  torch.matmul,  mm,  bmm   x, w.transpose(0, 1)
    w @ x                             x.transpose(-2, -1), w;    y.transpose(-2, -1)
    einsum("bsk,hkd->bshd", x, w)     x, w.permute(0, 2, 1).reshape(N, K);    y.unflatten(-1, (h, d))
    bmm(x, w[experts])                x, w.transpose(-2, -1) [E, N, K], with a routing
    grouped_mm(x, w, offs)            the same (``passes/experts.py``)

Nothing in the graph changes here: the result is a list of candidates. A candidate that cannot be
brought to this form carries the reason.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.einsum import linear_map
from int8fx.passes.experts import Routing, selected
from int8fx.passes.scope import Scope
from int8fx.passes.transforms import transform_of
from int8fx.passes.values import rank_of, shape_of
from int8fx.passes.weight_expression import (
    TRANSPOSE,
    Step,
    WeightExpression,
    resolve,
    without_broadcast,
)

Steps = tuple[Step, ...]

TWO_ACTIVATIONS = "both operands are activations"
FUSED = (
    "fused attention, whose products are not in the graph; load the model with "
    'attn_implementation="eager" to have them in int8'
)


def method(name: str, *args: Any) -> Step:
    return Step("call_method", name, args, ())


@dataclass(eq=False)
class Candidate:
    """One linear or matmul of the model.

    Attributes:
        node: what computes it now, in ``scope``.
        spelling: as the model wrote it, for people.
        x: the activation; ``x_steps`` bring it to ``[*, K]``.
        weight: ``[N, K]`` once evaluated, or ``[E, N, K]`` with a routing; None when no operand is
            a weight.
        routing: which of a batch of matrices a row meets, or None.
        factors: both operands of a product of two activations, or None.
        bias: 1-D, or None.
        addend: what is added to the result and is no 1-D bias.
        y_steps: bring ``[*, N]`` to the node's shape.
        refusal: why this is no linear map of one activation, or empty.
    """

    node: fx.Node
    scope: Scope
    spelling: str
    x: fx.Node | None = None
    x_steps: Steps = ()
    weight: WeightExpression | None = None
    bias: fx.Node | None = None
    addend: fx.Node | None = None
    y_steps: Steps = ()
    refusal: str = ""
    routing: Routing | None = None
    weight_shape: tuple[int, ...] | None = field(default=None)
    factors: tuple[fx.Node, fx.Node] | None = None

    def rebind(self, replaced: Mapping[fx.Node, fx.Node]) -> None:
        """Follows operands to the nodes that took their place."""
        for name in ("x", "bias", "addend"):
            node = getattr(self, name)
            setattr(self, name, replaced.get(node, node))
        if self.factors is not None:
            left, right = self.factors
            self.factors = replaced.get(left, left), replaced.get(right, right)

    def refused(self, reason: str) -> "Candidate":
        self.refusal = reason
        return self


@dataclass(frozen=True)
class _Call:
    """A call of the graph with its arguments by name, and the way to find weights in it."""

    node: fx.Node
    scope: Scope
    spelling: str
    is_weight: Callable[[fx.Node], bool]

    def arguments(self, *names: str, **defaults: Any) -> list[Any]:
        values = dict(zip((*names, *defaults), self.node.args, strict=False)) | self.node.kwargs
        return [values.get(name, defaults.get(name)) for name in (*names, *defaults)]

    def candidate(self) -> Candidate:
        return Candidate(self.node, self.scope, self.spelling)

    def weight(self, node: Any) -> WeightExpression | None:
        return resolve(node, self.scope, self.is_weight)


def _linear(call: _Call) -> Candidate:
    x, weight, bias = call.arguments("input", "weight", bias=None)
    return _with_weight(call, x, weight, (), bias=bias)


def _matmul(call: _Call) -> Candidate:
    left, right = call.arguments("input", "other")
    return _product(call, left, right)


def _mm(call: _Call) -> Candidate:
    left, right = call.arguments("input", "mat2")
    return _product(call, left, right)


def _addmm(call: _Call) -> Candidate:
    addend, left, right, beta, alpha = call.arguments("input", "mat1", "mat2", beta=1, alpha=1)
    return _scaled(call, addend, left, right, beta, alpha)


def _baddbmm(call: _Call) -> Candidate:
    addend, left, right, beta, alpha = call.arguments("input", "batch1", "batch2", beta=1, alpha=1)
    return _scaled(call, addend, left, right, beta, alpha)


def _scaled(call: _Call, addend: Any, left: Any, right: Any, beta: Any, alpha: Any) -> Candidate:
    if (beta, alpha) != (1, 1):
        return call.candidate().refused(f"beta={beta} and alpha={alpha}: only 1 and 1 are a linear")
    return _product(call, left, right, addend)


def _product(call: _Call, left: Any, right: Any, addend: Any = None) -> Candidate:
    factors = left, right
    left, right = without_broadcast(left), without_broadcast(right)
    # One row of one number, unsqueezed, looks broadcast.
    routed = _routed_product(call, *factors, addend) or _routed_product(call, left, right, addend)
    if routed is not None:
        return routed
    left_weight, right_weight = call.weight(left), call.weight(right)
    if left_weight and right_weight:
        return call.candidate().refused("both operands are weights")
    if right_weight:
        return _with_weight(call, left, right, (TRANSPOSE,), bias=addend)
    if not left_weight:
        candidate = call.candidate().refused(TWO_ACTIVATIONS)
        if addend is None and all(isinstance(factor, fx.Node) for factor in factors):
            candidate.factors = factors
        return candidate
    if rank_of(right) == 1:  # w @ v is F.linear(v, w)
        return _with_weight(call, right, left, (), bias=addend)
    swap = (method("transpose", -2, -1),)
    return _with_weight(call, right, left, (), bias=addend, x_steps=swap, y_steps=swap)


def _routed_product(call: _Call, left: Any, right: Any, addend: Any) -> Candidate | None:
    """A product of batches, one of them of weights or of weights chosen by an index."""
    for side, (operand, x) in enumerate(((right, left), (left, right))):
        weight, index, turned = selected(operand) or (operand, None, False)
        if rank_of(weight) != 3 or rank_of(x) != 3 or call.weight(weight) is None:
            continue
        x_shape, operand_shape = shape_of(x), shape_of(operand)
        assert x_shape is not None and operand_shape is not None
        if call.weight(x) is not None or x_shape[0] != operand_shape[0]:
            return None
        swap = (method("transpose", -2, -1),)
        steps = {"x_steps": swap, "y_steps": swap} if side else {}
        routing = Routing(index=index)
        transposed = turned if side else not turned
        return _with_routing(call, x, weight, routing, transposed=transposed, addend=addend, **steps)
    return None


def _grouped_mm(call: _Call) -> Candidate:
    names = ("input", "mat2")
    x, weight, ends, bias, dtype = call.arguments(*names, offs=None, bias=None, out_dtype=None)
    candidate = call.candidate()
    if rank_of(x) != 2 or rank_of(weight) != 3 or not isinstance(ends, fx.Node):
        return candidate.refused("a grouped product of other shapes than [S, K] and [E, K, N]")
    if bias is not None or dtype not in (None, x.meta["example_value"].dtype):
        return candidate.refused("a grouped product with a bias or an output dtype of its own")
    return _with_routing(call, x, weight, Routing(ends=ends), transposed=True)


def _grouped_fallback(call: _Call) -> Candidate:
    x, weight, ends = call.arguments("input", "weight", "offs")
    return _with_routing(call, x, weight, Routing(ends=ends), transposed=True)


def _with_routing(
    call: _Call,
    x: fx.Node,
    weight: fx.Node,
    routing: Routing,
    *,
    transposed: bool,
    addend: Any = None,
    x_steps: Steps = (),
    y_steps: Steps = (),
) -> Candidate:
    """A candidate of which each row meets its own matrix; ``transposed``: they are ``[E, K, N]``."""
    candidate = call.candidate()
    expression = call.weight(weight)
    if expression is None:
        return candidate.refused(_not_a_weight(call))
    candidate.weight = expression.then(method("transpose", -2, -1)) if transposed else expression
    candidate.x, candidate.routing, candidate.addend = x, routing, addend
    candidate.x_steps, candidate.y_steps = x_steps, y_steps
    return candidate


def _einsum(call: _Call) -> Candidate:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    candidate = call.candidate()
    if not isinstance(equation, str) or len(operands) != 2:
        return candidate.refused("einsum without an equation of two operands")
    weights = [call.weight(operand) for operand in operands]
    if all(weights):
        return candidate.refused("both operands are weights")
    if not any(weights):
        return candidate.refused(TWO_ACTIVATIONS)
    side = 0 if weights[0] else 1
    weight, x = operands[side], operands[1 - side]
    weight_shape, x_rank = shape_of(weight), rank_of(x)
    if weight_shape is None or x_rank is None:
        return candidate.refused("the shapes of its operands are not known")
    form = linear_map(equation, side, weight_shape, x_rank)
    if isinstance(form, str):
        return candidate.refused(form)
    to_steps = [[method(name, *args) for name, *args in steps] for steps in form]
    x_steps, weight_steps, y_steps = map(tuple, to_steps)
    return _with_weight(call, x, weight, weight_steps, x_steps=x_steps, y_steps=y_steps, rank=None)


def _with_weight(
    call: _Call,
    x: Any,
    weight: Any,
    weight_steps: Steps,
    *,
    bias: Any = None,
    x_steps: Steps = (),
    y_steps: Steps = (),
    rank: int | None = 2,
) -> Candidate:
    candidate = call.candidate()
    expression = call.weight(weight)
    candidate.weight_shape = shape_of(weight)
    if expression is None:
        return candidate.refused(_not_a_weight(call))
    candidate.weight = expression
    if not isinstance(x, fx.Node):
        return candidate.refused("the input is a constant")
    if call.weight(x) is not None:
        return candidate.refused("both operands are weights")
    if rank is not None and rank_of(weight) != rank:
        dimensions = {1: "a vector", 3: "a batch of matrices"}.get(rank_of(weight) or 0, "not 2-D")
        return candidate.refused(f"the weight is {dimensions}")
    candidate.x, candidate.x_steps, candidate.y_steps = x, x_steps, y_steps
    candidate.weight = expression.then(*weight_steps)
    if isinstance(bias, fx.Node):
        # With y transposed after the product, a bias of the product's last dimension is no bias.
        plain = rank_of(bias) == 1 and not y_steps and not _is_broadcast(bias, weight, weight_steps)
        candidate.bias, candidate.addend = (bias, None) if plain else (None, bias)
    return candidate


def _not_a_weight(call: _Call) -> str:
    if call.scope.closed:
        return "inside a sub-graph that weights cannot be traced through"
    return "the weight is an activation: neither a parameter nor a buffer, nor a view of one"


def _is_broadcast(bias: fx.Node, weight: fx.Node, weight_steps: Steps) -> bool:
    shape, bias_shape = shape_of(weight), shape_of(bias)
    if shape is None or bias_shape is None:
        return True
    N = shape[1] if weight_steps else shape[0]
    return bias_shape[0] != N


aten = torch.ops.aten

# A spelling is what Dynamo puts into a graph: a function, the name of a Tensor method, or the name of
# another package's operator.
SPELLINGS: dict[Any, tuple[str, Callable[[_Call], Candidate]]] = {
    F.linear: ("torch.nn.functional.linear", _linear),
    torch.matmul: ("torch.matmul", _matmul),
    operator.matmul: ("@", _matmul),
    "matmul": ("Tensor.matmul", _matmul),
    "__matmul__": ("@", _matmul),
    torch.mm: ("torch.mm", _mm),
    "mm": ("Tensor.mm", _mm),
    torch.bmm: ("torch.bmm", _mm),
    "bmm": ("Tensor.bmm", _mm),
    torch.addmm: ("torch.addmm", _addmm),
    "addmm": ("Tensor.addmm", _addmm),
    torch.baddbmm: ("torch.baddbmm", _baddbmm),
    "baddbmm": ("Tensor.baddbmm", _baddbmm),
    torch.einsum: ("torch.einsum", _einsum),
    torch.functional.einsum: ("torch.einsum", _einsum),
    torch._grouped_mm: ("torch.nn.functional.grouped_mm", _grouped_mm),
    F.grouped_mm: ("torch.nn.functional.grouped_mm", _grouped_mm),
    "transformers.grouped_mm_fallback": ("transformers.grouped_mm_fallback", _grouped_fallback),
    aten.linear.default: ("aten.linear", _linear),
    aten.matmul.default: ("aten.matmul", _matmul),
    aten.mm.default: ("aten.mm", _mm),
    aten.bmm.default: ("aten.bmm", _mm),
    aten.addmm.default: ("aten.addmm", _addmm),
    aten.baddbmm.default: ("aten.baddbmm", _baddbmm),
}


def candidates(
    root: Scope, is_weight: Callable[[fx.Node], bool], attention: bool = False
) -> list[Candidate]:
    """Every linear or matmul below ``root``, in the order in which they run.

    Args:
        attention: whether fused attention counts as one, too. It is refused: to take it apart would
            write the probabilities to memory, which it is there to avoid.
    """
    found = []
    for scope in root.walk():
        for node in scope.graph.nodes:
            if node.op not in ("call_function", "call_method"):
                continue
            # Operators of other packages are known by name: they need not be there.
            entry = SPELLINGS.get(node.target) or SPELLINGS.get(str(node.target))
            if entry is not None:
                spelling, match = entry
                candidate = match(_Call(node, scope, spelling, is_weight))
                if transform := transform_of(node):
                    candidate.factors = None
                    candidate.refused(transform)
                found.append(candidate)
            elif node.target is F.multi_head_attention_forward:
                found.append(_fused_attention(node, scope))
            elif attention and node.target is F.scaled_dot_product_attention:
                spelling = "torch.nn.functional.scaled_dot_product_attention"
                found.append(Candidate(node, scope, spelling).refused(FUSED))
    return found


def _fused_attention(node: fx.Node, scope: Scope) -> Candidate:
    candidate = Candidate(node, scope, "torch.nn.functional.multi_head_attention_forward")
    return candidate.refused("its projections are inside one fused call of torch")
