"""``int8fx::quantize``: rows of floats to int8, with their outliers apart.

    x ≈ x_int8 · x_scale + x_outlier

The reference is ``quantize_reference.py``. The gradient is straight-through and carried by
``x_outlier``: ``int8_linear`` hands it the gradient of the whole input, and it is passed on unmasked.
"""

import torch
from torch import Tensor

from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.quantize_reference import quantize_reference


def _quantize(x: Tensor, threshold: float, decomposition: str) -> tuple[Tensor, ...]:
    return quantize_reference(x, threshold, decomposition)


def _fake(x: Tensor, threshold: float, decomposition: str) -> tuple[Tensor, ...]:
    without = threshold == 0
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
        x.new_empty(0) if without else torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(0 if without else x.shape[-1], dtype=torch.bool),
    )


def _setup(ctx, inputs, output) -> None:
    _, threshold, _ = inputs
    x_int8, x_scale, _, outlier_columns = output
    ctx.decomposed = threshold != 0
    ctx.mark_non_differentiable(x_int8, x_scale, outlier_columns)


def _backward(ctx, _int8, _scale, grad_outlier, _columns):
    return (grad_outlier if ctx.decomposed else None), None, None


quantize = register(
    "quantize(Tensor x, float threshold, str decomposition) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _fake,
    _setup,
    _backward,
)
