"""A linear in a scheme's arithmetic whose float weight is trained: quantised anew at each call.

    y = x̂ @ ŵᵀ + bias       by the scheme's own product, so bit for bit that of the quantised weight
    grad_x = grad @ ŵ       grad_weight = gradᵀ @ x̂       grad_bias = Σ grad

x̂ and ŵ are what the scheme makes of x and of the weight. Their rounding, and the scales that follow
from them, count as the identity in the gradient: the straight-through estimator (Bengio et al. 2013,
arXiv 1308.3432; Jacob et al. 2018, arXiv 1712.05877, for training so).

Each is one call to a graph. A graph of the weight's quantisation would be compiled for every scheme and
shape, and would round as Inductor fuses it, not as ``int8fx.quantize_`` does.
"""

from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.ops.gradients import bias_gradient
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.text import choice_of


def _dequantized(weight: Tensor, choice: Choice, dtype: torch.dtype) -> Tensor:
    """ŵ ``[N, K]``; in fp64 of scales in fp64, as of a quantised weight."""
    kept = choice.weight_format
    stored = kept.quantize(weight)
    if dtype == torch.float64:
        stored = tuple(part.double() if part.is_floating_point() else part for part in stored)
    return kept.dequantize(stored, *weight.shape).to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: str, settings: str) -> Tensor:
    """The first formula.

    Args:
        x: ``[*, K]``. In fp32, bf16 or fp16 it is quantised as the scheme has it; in another dtype, as
            eager calls of a quantised weight have it, the weight alone is.
        weight: ``[N, K]``, fp32, bf16 or fp16.
        bias: ``[N]`` or None.
        scheme: a name of ``int8fx.SCHEMES``.
        settings: of the scheme, as JSON.

    Returns:
        ``[*, N]`` of x's dtype.

    Raises:
        ValueError: there is no such scheme, or setting of it.
    """
    # x has the dtype of autocast already, and nothing below it may be cast to that.
    with torch.autocast(x.device.type, enabled=False):
        y = _product(x.reshape(-1, x.shape[-1]), weight, bias, choice_of(scheme, settings))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, choice: Choice) -> Tensor:
    if x.dtype in DTYPES:
        return choice.product(x, choice.quantize(weight), bias)
    y = x @ _dequantized(weight, choice, x.dtype).t()
    return y if bias is None else y + bias


def _fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _input_gradient(grad: Tensor, weight: Tensor, scheme: str, settings: str) -> Tensor:
    return grad @ _dequantized(weight, choice_of(scheme, settings), grad.dtype)


def _input_gradient_fake(grad: Tensor, weight: Tensor, scheme: str, settings: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype, scheme: str, settings: str) -> Tensor:
    choice, rows = choice_of(scheme, settings), x.reshape(-1, x.shape[-1])
    if x.dtype in DTYPES:
        rows = choice.scheme.dequantized_input(rows, choice.settings)
    return (grad.reshape(-1, grad.shape[-1]).t() @ rows.to(grad.dtype)).to(dtype)


def _weight_gradient_fake(
    grad: Tensor, x: Tensor, dtype: torch.dtype, scheme: str, settings: str
) -> Tensor:
    return grad.new_empty(grad.shape[-1], x.shape[-1], dtype=dtype)


input_gradient = register(
    "straight_through_input_gradient(Tensor grad, Tensor weight, str scheme, str settings) -> Tensor",
    _input_gradient,
    _input_gradient_fake,
)
weight_gradient = register(
    "straight_through_weight_gradient(Tensor grad, Tensor x, ScalarType dtype, str scheme, "
    "str settings) -> Tensor",
    _weight_gradient,
    _weight_gradient_fake,
)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, bias, *ctx.how = inputs
    # An input that takes no gradient needs none of the other.
    takes = ctx.needs_input_grad
    ctx.save_for_backward(x if takes[1] else None, weight if takes[0] else None)
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    of_x = None if weight is None else input_gradient(grad, weight, *ctx.how)
    of_weight = None if x is None else weight_gradient(grad, x, ctx.weight_dtype, *ctx.how)
    takes_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[2]
    of_bias = bias_gradient(grad, ctx.bias_dtype) if takes_bias else None
    return of_x, of_weight, of_bias, None, None


straight_through_linear = register(
    "straight_through_linear(Tensor x, Tensor weight, Tensor? bias, str scheme, str settings) "
    "-> Tensor",
    _linear,
    _fake,
    _setup,
    _backward,
)
