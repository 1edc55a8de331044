"""Experts by a scheme's product for one matrix, expert after expert.

    y[s] = product(x[s], packed[e]),   e the expert of row s

It is for schemes that have no product for all experts at once (``Scheme.experts``). Memory peaks at
what the product of one expert takes: of a format without a kernel, one de-quantised matrix.

The gradient is straight-through: ``grad[s] @ ŵ[e]``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from int8fx.kernels import packing
from int8fx.kernels.ops.expert_linear import routed_rows
from int8fx.kernels.ops.library import register
from int8fx.kernels.schemes.scheme import Call, Choice
from int8fx.kernels.schemes.text import as_text, choice_of

EACH = "expert after expert, by the product of one matrix"


def lowering(choice: Choice) -> Callable[..., Any] | None:
    """``(call, x [S, K], packed weight [E, ...], (experts, ends)) -> y [S, N]``; None: the scheme has
    no product for experts."""
    if choice.scheme.experts is not None:
        return choice.lower_experts
    return functools.partial(_lower, choice) if choice.scheme.each_expert else None


def note(choice: Choice) -> str:
    """How experts are computed where no operator takes all of them; or empty."""
    return EACH if choice.scheme.experts is None and choice.scheme.each_expert else ""


def _lower(choice: Choice, call: Call, x: Any, weight: Sequence[Any], routing: Any) -> Any:
    return call(scheme_expert_linear, x, *as_text(choice), list(weight), *routing)


def _linear(
    x: Tensor,
    scheme: str,
    settings: str,
    weight: Sequence[Tensor],
    experts: Tensor | None,
    ends: Tensor | None,
) -> Tensor:
    """The formula above; a row without an expert is zero.

    Args:
        x: ``[S, K]``, fp32, bf16 or fp16.
        scheme, settings: see ``text.py``.
        weight: the packed parts of E matrices ``[N, K]``, stacked.
        experts, ends: see ``kernels/ops/expert_linear.py``.

    Returns:
        ``[S, N]`` of x's dtype.
    """
    choice, y = choice_of(scheme, settings), _fake(x, scheme, settings, weight).zero_()
    for e, rows in routed_rows(experts, ends, len(weight[0])):
        y[rows] = choice.product(x[rows], choice.weight_format.matrix_of(weight, e), None)
    return y


def _fake(x: Tensor, scheme: str, settings: str, weight: Sequence[Tensor], *routing: Any) -> Tensor:
    weight_format = choice_of(scheme, settings).weight_format
    return x.new_empty(x.shape[0], weight_format.rows(weight_format.matrix_of(weight, 0)))


def _gradient(
    grad: Tensor,
    scheme: str,
    settings: str,
    weight: Sequence[Tensor],
    experts: Tensor | None,
    ends: Tensor | None,
    K: int,
) -> Tensor:
    weight_format, grad_x = choice_of(scheme, settings).weight_format, grad.new_zeros(len(grad), K)
    for e, rows in routed_rows(experts, ends, len(weight[0])):
        stored = packing.unpack(weight_format, weight_format.matrix_of(weight, e), grad.shape[1], K)
        grad_x[rows] = grad[rows] @ weight_format.dequantize(stored, grad.shape[1], K).to(grad.dtype)
    return grad_x


def _gradient_fake(grad: Tensor, scheme: str, settings: str, weight: Any, e: Any, ends: Any, K: int):
    return grad.new_empty(grad.shape[0], K)


gradient = register(
    "scheme_expert_linear_backward(Tensor grad, str scheme, str settings, Tensor[] weight, "
    "Tensor? experts, Tensor? ends, SymInt K) -> Tensor",
    _gradient,
    _gradient_fake,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, ctx.scheme, ctx.settings, weight, experts, ends = inputs
    ctx.save_for_backward(experts, ends, *weight)
    ctx.K = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    experts, ends, *weight = ctx.saved_tensors
    of_x = gradient(grad, ctx.scheme, ctx.settings, weight, experts, ends, ctx.K)
    return of_x, None, None, [None] * len(weight), None, None


scheme_expert_linear = register(
    "scheme_expert_linear(Tensor x, str scheme, str settings, Tensor[] weight, Tensor? experts, "
    "Tensor? ends) -> Tensor",
    _linear,
    _fake,
    _setup,
    _backward,
)
