"""The expert linear of a mixture of experts: each row meets the matrix of its own expert.

    y[s] = x̂[s] @ ŵ[e]ᵀ,   e = experts[s],   ŵ[e] = w_int8[e] · w_scale[e]

``x̂`` is LLM.int8()'s (``kernels/ops/quantize_reference.py``); with the column decomposition, a column
is taken out where it holds an outlier in any row *of one expert*, since these rows are one product.
Weights are quantised per expert and per channel. On a CPU it is one C++ product
(``int8_linears``) for each expert that has rows, and no copy of a weight is made, where
indexing ``weight[experts]`` in float makes one for every row. On a GPU another operator takes its place
(``kernels/gpu/experts.py``), which asks nothing on the host.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from int8fx.kernels.ops.gradients import input_gradient
from int8fx.kernels.ops.int8_linears import int8_linears
from int8fx.kernels.ops.library import register

Rows = slice | Tensor


def rows_of_experts(experts: Tensor, E: int) -> Iterator[tuple[int, Rows]]:
    """Each expert that has rows, with these: a slice where rows come sorted, else their indices.

    Args:
        experts: ``[S]`` integers from ``-E`` to ``E``. A negative one counts from the end, as an
            index does; ``E`` stands for no expert.

    Raises:
        IndexError: names an expert that is not there.
    """
    if experts.numel() == 0:
        return
    lowest, highest = (int(end) for end in torch.aminmax(experts))
    if lowest < -E or highest > E:
        wrong = lowest if lowest < -E else highest
        raise IndexError(f"expert {wrong} of {E}: allowed are {-E} to {E - 1}, and {E} for none")
    experts = torch.where(experts < 0, experts + E, experts)
    ends = torch.bincount(experts, minlength=E + 1).cumsum(0).tolist()
    in_order = bool((experts[1:] >= experts[:-1]).all())
    order = None if in_order else torch.argsort(experts, stable=True)
    for expert, (start, end) in enumerate(zip([0, *ends[: E - 1]], ends[:E], strict=True)):
        if start < end:
            yield expert, slice(start, end) if order is None else order[start:end]


def sorted_rows(ends: Tensor) -> Iterator[tuple[int, Rows]]:
    """The same where rows come sorted and ``ends [E]`` says where those of each expert end."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            yield expert, slice(start, end)
        start = end


def routed_rows(experts: Tensor | None, ends: Tensor | None, E: int) -> Iterator[tuple[int, Rows]]:
    """Each expert that has rows, with these: by ``experts``, or by ``ends`` where that is given."""
    check_routing(experts, ends, E)
    if ends is not None:
        return sorted_rows(ends)
    assert experts is not None
    return rows_of_experts(experts, E)


def check_routing(experts: Tensor | None, ends: Tensor | None, E: int) -> None:
    """Raises:
    ValueError: not one of ``experts`` and ``ends``, or not an end for each expert.
    """
    if (experts is None) == (ends is None):
        raise ValueError("rows have either their experts or, sorted, the ends of each expert's rows")
    if ends is not None and ends.shape != (E,):
        raise ValueError(f"ends has the shape {list(ends.shape)}; for {E} experts it has to be [{E}]")


def _expert_linear(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weight: Tensor,
    w_scale: Tensor,
    experts: Tensor | None,
    ends: Tensor | None = None,
) -> Tensor:
    """The formula above; a row without an expert is zero.

    Args:
        x: ``[S, K]``, fp32, bf16 or fp16.
        weight: ``[E, ...]`` int8, each matrix packed for the device (``kernels/table.py``).
        w_scale: ``[E, N]`` fp32.
        experts: ``[S]``, see ``rows_of_experts``; or None, where rows come sorted.
        ends: then ``[E]``, where the rows of each expert end.

    Returns:
        ``[S, N]`` in x's dtype.
    """
    y = x.new_zeros((x.shape[0], w_scale.shape[1]))
    for expert, rows in routed_rows(experts, ends, weight.shape[0]):
        (y[rows],) = int8_linears(
            x[rows], threshold, decomposition, [weight[expert]], [w_scale[expert]], []
        )
    return y


def _fake(x, threshold, decomposition, weight, w_scale, experts, ends=None) -> Tensor:
    return x.new_empty((x.shape[0], w_scale.shape[1]))


def setup_context(ctx, inputs, output) -> None:
    """Of any operator with the arguments of ``expert_linear``."""
    x, _, _, weight, w_scale, *routing = inputs
    ends = routing[1] if len(routing) > 1 else None  # an argument at its default is not among them
    ctx.save_for_backward(weight, w_scale, routing[0], ends)
    ctx.K, ctx.inputs = x.shape[-1], len(inputs)


def _input_gradient(
    grad: Tensor, weight: Tensor, w_scale: Tensor, experts: Tensor | None, ends: Tensor | None, K: int
) -> Tensor:
    """``grad[s] @ ŵ[e]``: straight through the rounding of x, as that of ``int8_linear``."""
    grad_x = grad.new_zeros((grad.shape[0], K))
    for expert, rows in routed_rows(experts, ends, weight.shape[0]):
        grad_x[rows] = input_gradient(grad[rows], weight[expert], w_scale[expert], K)
    return grad_x


def _input_gradient_fake(grad, weight, w_scale, experts, ends, K) -> Tensor:
    return grad.new_empty((grad.shape[0], K))


# An operator of its own, since which experts have rows is known at run time only.
expert_linear_backward = register(
    "expert_linear_backward(Tensor grad, Tensor weight, Tensor w_scale, Tensor? experts, "
    "Tensor? ends, SymInt K) -> Tensor",
    _input_gradient,
    _input_gradient_fake,
)


def _backward(ctx, grad: Tensor) -> tuple:
    grad_x = expert_linear_backward(grad, *ctx.saved_tensors, ctx.K)
    return (grad_x, *[None] * (ctx.inputs - 1))


expert_linear = register(
    "expert_linear(Tensor x, float threshold, str decomposition, Tensor weight, Tensor w_scale, "
    "Tensor? experts, Tensor? ends=None) -> Tensor",
    _expert_linear,
    _fake,
    setup_context,
    _backward,
)
