"""``int8fx::int8_linears``: several int8 linears of one x in float, in one call.

    quantize(x), then int8_linear of each weight

``single_int8_linear``, its overload ``single``, is the same of one weight, whose result is no list
(``passes/int8/unlist_linears.py``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels.ops.gradients import linears_backward, linears_setup
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.linear_reference import linear_reference
from int8fx.kernels.ops.pack_weight import unpack_weight
from int8fx.kernels.ops.quantize_reference import quantize_reference


def _linears(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """Plain PyTorch.

    Args:
        x, threshold, decomposition: as ``quantize_reference`` takes them.
        weights: each packed for the device (``kernels/table.py``).
        w_scales: each ``[N_i]`` fp32.
        biases: each ``[N_i]``; or empty, no linear has one.

    Returns:
        each ``[*, N_i]``, of x's dtype.
    """
    x_int8, x_scale, x_outlier, columns = quantize_reference(x, threshold, decomposition)
    outliers: tuple[Tensor, Tensor | None] = (x, None) if threshold == 0 else (x_outlier, columns)
    outputs = []
    all_biases: Sequence[Tensor | None] = biases or [None] * len(weights)
    for weight, w_scale, bias in zip(weights, w_scales, all_biases, strict=True):
        w_int8 = unpack_weight(weight, w_scale.shape[0], x.shape[-1])
        outputs.append(linear_reference(x_int8, x_scale, *outliers, w_int8, w_scale, bias))
    return outputs


def _fake_of(x: Tensor, w_scale: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], w_scale.shape[0]), dtype=x.dtype, device=x.device)


def _linears_fake(x, threshold, decomposition, weights, w_scales, biases) -> list[Tensor]:
    return [_fake_of(x, w_scale) for w_scale in w_scales]


int8_linears = register(
    "int8_linears(Tensor x, float threshold, str decomposition, "
    "Tensor[] weights, Tensor[] w_scales, Tensor[] biases) -> Tensor[]",
    _linears,
    _linears_fake,
    linears_setup,
    linears_backward,
)


# --- of one weight: its arguments as those of several ----------------------------------------------


def _as_lists(x, threshold, decomposition, weight, w_scale, bias) -> tuple:
    return x, threshold, decomposition, [weight], [w_scale], [] if bias is None else [bias]


def _linear(x, threshold, decomposition, weight, w_scale, bias) -> Tensor:
    arguments = _as_lists(x, threshold, decomposition, weight, w_scale, bias)
    return int8_linears(*arguments)[0]


def _linear_fake(x, threshold, decomposition, weight, w_scale, bias) -> Tensor:
    return _fake_of(x, w_scale)


def _linear_setup(ctx, inputs, output) -> None:
    linears_setup(ctx, _as_lists(*inputs), output)


def _linear_backward(ctx, grad: Tensor) -> tuple:
    grad_x, *_, grad_biases = linears_backward(ctx, [grad])
    return grad_x, None, None, None, None, (grad_biases[0] if grad_biases else None)


single_int8_linear = register(
    "int8_linears.single(Tensor x, float threshold, str decomposition, "
    "Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor",
    _linear,
    _linear_fake,
    _linear_setup,
    _linear_backward,
)
