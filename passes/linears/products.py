"""Products of two tensors, as candidates: which is the weight, and what brings it to ``[N, K]``.

A matcher takes a call and the call's own arguments, and answers with a candidate, which carries the
reason when it is refused. ``canonicalize.py`` says which spelling is whose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from int8fx.passes.graph.scope import Scope
from int8fx.passes.graph.values import no_tensor_reason, rank_of, shape_of
from int8fx.passes.graph.weight_expression import (
    TRANSPOSE,
    WeightExpression,
    computed_of_weights,
    resolve,
    without_broadcast,
)
from int8fx.passes.linears.candidate import Candidate, Steps, method
from int8fx.passes.linears.einsum import linear_map, tensordot_equation
from int8fx.passes.linears.experts import Routing, selected
from int8fx.passes.linears.linear_form import form_shape, repetition

TWO_ACTIVATIONS = "both operands are activations"
TWO_WEIGHTS = "both operands are weights"
WRITES_OUT = "it writes its result into out="


@dataclass(frozen=True)
class Call:
    """A call of the graph, and the way to find weights in it."""

    node: fx.Node
    scope: Scope
    spelling: str
    path_of: Callable[[fx.Node], str | None]

    def candidate(self) -> Candidate:
        return Candidate(self.node, self.scope, self.spelling)

    def refused(self, reason: str) -> Candidate:
        return self.candidate().refused(reason)

    def weight(self, node: Any) -> WeightExpression | None:
        return resolve(node, self.scope, lambda node: self.path_of(node) is not None)

    def computed(self, *operands: Any) -> str:
        """What an operand is that is computed from parameters alone; or empty."""
        of_weights = (computed_of_weights(each, self.scope, self.path_of) for each in operands)
        computed = next(filter(None, of_weights), "")
        return f"the weight is an activation, computed from parameters alone ({computed})" * bool(
            computed
        )

    def not_a_weight(self, operand: Any) -> str:
        if self.scope.closed:
            return "inside a sub-graph that weights cannot be traced through"
        if computed := self.computed(operand):
            return computed
        return "the weight is an activation: neither a parameter nor a buffer, nor a view of one"


def linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Candidate:
    expression = call.weight(weight)
    if expression is None:
        return call.refused(call.not_a_weight(weight))
    return _with_matrix(call, input, expression, bias=bias)


def straight_through(
    call: Call, x: Any, weight: Any, bias: Any, scheme: str, settings: str
) -> Candidate:
    """A linear that ``int8fx.prepare_qat_`` prepared; its weight is quantised at each call."""
    candidate = call.candidate()
    candidate.weight = call.weight(weight)
    return candidate.refused(
        f"its weight is trained in {scheme} (QAT) and quantised at each call; int8fx.convert_qat_ "
        "quantises it for good"
    )


def matmul(call: Call, input: Any, other: Any) -> Candidate:
    return _product(call, input, other)


def reversed_matmul(call: Call, input: Any, other: Any) -> Candidate:
    return _product(call, other, input)


def mm(call: Call, input: Any, mat2: Any) -> Candidate:
    return _product(call, input, mat2)


def mv(call: Call, input: Any, vec: Any) -> Candidate:
    return _product(call, input, vec)


def addmm(call: Call, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Candidate:
    return _scale_reason(call, beta, alpha) or _product(call, mat1, mat2, input)


def addmv(call: Call, input: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> Candidate:
    return _scale_reason(call, beta, alpha) or _product(call, mat, vec, input)


def baddbmm(
    call: Call, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1
) -> Candidate:
    return _scale_reason(call, beta, alpha) or _product(call, batch1, batch2, input)


def addbmm(
    call: Call, input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1
) -> Candidate:
    """``input + Σ_b batch1[b] @ batch2[b]``: the batch is contracted with K."""
    scaled = _scale_reason(call, beta, alpha)
    return scaled or _contraction(call, "bmk,bkn->mn", batch1, batch2, input)


def _scale_reason(call: Call, beta: Any, alpha: Any) -> Candidate | None:
    if (beta, alpha) == (1, 1):
        return None
    return call.refused(f"beta={beta} and alpha={alpha}: only 1 and 1 are a linear")


def multi_dot(call: Call, tensors: Any) -> Candidate:
    if len(tensors) != 2:
        return call.refused(f"a chain of {len(tensors)} matrices: only a product of two is a linear")
    return _product(call, *tensors)


def chain_matmul(call: Call, *matrices: Any) -> Candidate:
    return multi_dot(call, matrices)


def _product(call: Call, left: Any, right: Any, addend: Any = None) -> Candidate:
    """``left @ right + addend``, with the shapes of ``torch.matmul``."""
    routed = _routed_product(call, left, right, addend)
    if routed is not None:
        return routed
    weights = [_matrix(call, operand) for operand in (left, right)]
    side = _weight_side(call, left, right, weights)
    if isinstance(side, str):
        candidate = call.refused(side)
        if not any(weights) and addend is None and _are_nodes(left, right):
            candidate.factors = left, right
        return candidate
    x = left if side else right
    expression = weights[side]
    assert expression is not None
    if side:
        return _with_matrix(call, x, expression, bias=addend, weight_steps=(TRANSPOSE,))
    if rank_of(x) == 1:  # w @ v is F.linear(v, w)
        return _with_matrix(call, x, expression, bias=addend)
    swap = (method("transpose", -2, -1),)
    return _with_matrix(call, x, expression, bias=addend, x_steps=swap, y_steps=swap)


def _are_nodes(*operands: Any) -> bool:
    return all(isinstance(operand, fx.Node) for operand in operands)


def _weight_side(
    call: Call, left: Any, right: Any, weights: Sequence[WeightExpression | None]
) -> int | str:
    """Which operand of a product is the weight, 0 or 1; or why none is."""
    if all(weights):
        # What is repeated for each of a batch is what the batch reads, as learned queries are.
        query = _is_repeated(call, left) and not _is_repeated(call, right)
        return 1 if query else TWO_WEIGHTS
    if not any(weights):
        return call.computed(right, left) or TWO_ACTIVATIONS
    return 0 if weights[0] else 1


def _matrix(call: Call, node: Any) -> WeightExpression | None:
    """A weight; of a batch whose slices are all one matrix, that matrix. None for no weight."""
    expression = call.weight(without_broadcast(node))
    if expression is None:
        return None
    value = expression.meta()
    batch = list(zip(value.shape, value.stride(), strict=True))[:-2]
    if all(size == 1 or (size and stride == 0) for size, stride in batch):
        return expression.then(*[method("select", 0, 0)] * len(batch))
    return expression


def _is_repeated(call: Call, node: Any) -> bool:
    """Whether a weight is seen through an ``expand``, or as a batch of one."""
    if without_broadcast(node) is not node:
        return True
    expression = call.weight(node)
    if expression is None:
        return False
    value = expression.meta()
    dimensions = zip(value.shape, value.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in dimensions)


def _routed_product(call: Call, left: Any, right: Any, addend: Any) -> Candidate | None:
    """A product of batches, one of them of weights or of weights chosen by an index."""
    for side, (operand, x) in enumerate(((right, left), (left, right))):
        weight, index, turned = selected(operand) or (operand, None, False)
        if rank_of(weight) != 3 or rank_of(x) != 3 or call.weight(weight) is None:
            continue
        if _is_repeated(call, weight):  # one matrix for all
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


def grouped_mm(
    call: Call, input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Candidate:
    if rank_of(input) != 2 or rank_of(mat2) != 3 or not isinstance(offs, fx.Node):
        return call.refused("a grouped product of other shapes than [S, K] and [E, K, N]")
    if bias is not None or out_dtype not in (None, input.meta["example_value"].dtype):
        return call.refused("a grouped product with a bias or an output dtype of its own")
    return _with_routing(call, input, mat2, Routing(ends=offs), transposed=True)


def grouped_fallback(call: Call, input: Any, weight: Any, offs: Any) -> Candidate:
    return _with_routing(call, input, weight, Routing(ends=offs), transposed=True)


def _with_routing(
    call: Call,
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
        return candidate.refused(call.not_a_weight(weight))
    candidate.weight = expression.then(method("transpose", -2, -1)) if transposed else expression
    candidate.x, candidate.routing, candidate.addend = x, routing, addend
    candidate.x_steps, candidate.y_steps = x_steps, y_steps
    return candidate


def einsum(call: Call, equation: Any, *operands: Any) -> Candidate:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return call.refused("einsum without an equation of two operands")
    return _contraction(call, equation, *operands)


def tensordot(call: Call, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Candidate:
    if out is not None:
        return call.refused(WRITES_OUT)
    left, right = rank_of(a), rank_of(b)
    if not left or not right or not isinstance(dims, int | list | tuple):
        return call.refused("a contraction of scalars, or over dimensions that are not known")
    return _contraction(call, tensordot_equation(dims, left, right), a, b)


def inner(call: Call, input: Any, other: Any) -> Candidate:
    return tensordot(call, input, other, ((-1,), (-1,)))


def _contraction(call: Call, equation: str, left: Any, right: Any, addend: Any = None) -> Candidate:
    """``einsum(equation, left, right) + addend``."""
    weights = [call.weight(operand) for operand in (left, right)]
    side = _weight_side(call, left, right, weights)
    if isinstance(side, str):
        return call.refused(side)
    weight, x = (right, left) if side else (left, right)
    weight_shape, x_shape = shape_of(weight), shape_of(x)
    if weight_shape is None or x_shape is None:
        return call.refused("the shapes of its operands are not known")
    form = linear_map(equation, side, weight_shape, x_shape)
    if isinstance(form, str):
        return call.refused(form)
    to_steps = [[method(name, *args) for name, *args in steps] for steps in form]
    x_steps, weight_steps, y_steps = map(tuple, to_steps)
    expression = weights[side]
    assert expression is not None
    expression = expression.then(*weight_steps)
    return _with_weight(call, x, expression, bias=addend, x_steps=x_steps, y_steps=y_steps)


def convolution(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Candidate | None:
    """A kernel of one point is a linear of the channels; None for a wider one, which is none."""
    shape = shape_of(weight)
    if shape is None or any(size != 1 for size in shape[2:]):
        return None
    candidate = call.candidate()
    candidate.weight = expression = call.weight(weight)
    if expression is None:
        return candidate.refused(call.not_a_weight(weight))
    if any(step != 1 for step in _each(stride)):
        return candidate.refused(f"a convolution with stride {stride}: only 1 is a linear")
    if padding not in ("same", "valid") and any(_each(padding)):
        return candidate.refused(f"a convolution with padding {padding}: only 0 is a linear")
    if groups != 1:
        return candidate.refused(f"a convolution of {groups} groups: only of 1 it is a linear")
    channels = 1 - len(shape)  # counted from the end: x may come without a batch
    to_rows, to_image = method("movedim", channels, -1), method("movedim", -1, channels)
    matrix = expression.then(method("flatten", 1))
    candidate = _with_weight(call, input, matrix, x_steps=(to_rows,), y_steps=(to_image,))
    candidate.bias = bias
    return candidate


def _each(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _with_matrix(
    call: Call,
    x: Any,
    weight: WeightExpression,
    *,
    bias: Any = None,
    x_steps: Steps = (),
    weight_steps: Steps = (),
    y_steps: Steps = (),
) -> Candidate:
    """A candidate of one matrix. Where eager repeats it for each of a batch, the result is repeated."""
    rank = weight.meta().dim()
    if rank != 2:
        candidate = call.candidate()
        candidate.weight = weight
        dimensions = {1: "a vector", 3: "a batch of matrices"}.get(rank, "not 2-D")
        return candidate.refused(f"the weight is {dimensions}")
    weight = weight.then(*weight_steps)
    candidate = _with_weight(call, x, weight, bias=bias, x_steps=x_steps, y_steps=y_steps)
    if candidate.refusal:
        return candidate
    if reason := no_tensor_reason(x, call.node):
        return candidate.refused(reason)
    try:
        repeat = repetition(form_shape(candidate), shape_of(call.node))
    except ValueError as error:
        return candidate.refused(str(error))
    if isinstance(repeat, str):
        return candidate.refused(repeat)
    candidate.y_steps += tuple(method(name, *args) for name, *args in repeat)
    return candidate


def _with_weight(
    call: Call,
    x: Any,
    weight: WeightExpression,
    *,
    bias: Any = None,
    x_steps: Steps = (),
    y_steps: Steps = (),
) -> Candidate:
    """A candidate whose weight is ``[N, K]``, with what is added to its result."""
    candidate = call.candidate()
    candidate.weight = weight
    if not isinstance(x, fx.Node):
        return candidate.refused("the input is a constant")
    candidate.x, candidate.x_steps, candidate.y_steps = x, x_steps, y_steps
    if isinstance(bias, fx.Node):
        # With y transposed after the product, a bias of the product's last dimension is no bias.
        plain = shape_of(bias) == (weight.meta().shape[0],) and not y_steps
        candidate.bias, candidate.addend = (bias, None) if plain else (None, bias)
    return candidate
