"""``int8fx::int8_linear``: the linear of an x that is quantised already.

    y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias

The reference is ``linear_reference.py``. The gradient is straight-through: with ŵ = w_int8 · w_scale,
the gradient of the input is ``grad @ ŵ``, which ``x_outlier`` carries (``quantize.py``).

**The operators.** One file of this folder is one operator: its schema, its plain-PyTorch kernel, its
fake implementation and its gradient. Faster kernels register themselves for their dispatch key and are
listed in ``kernels/table.py``. Operators whose names end in ``_gpu`` are a GPU's own, in Triton. This
module has the others of an int8 linear, too, for code that needs several of them.
"""

import torch
from torch import Tensor

from int8fx.kernels.ops.gradients import bias_gradient, input_gradient
from int8fx.kernels.ops.int8_linears import int8_linears, single_int8_linear
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.linear_reference import linear_reference
from int8fx.kernels.ops.pack_weight import pack_weight, unpack_weight
from int8fx.kernels.ops.quantize import quantize

__all__ = [
    "int8_linear",
    "int8_linears",
    "pack_weight",
    "quantize",
    "single_int8_linear",
    "unpack_weight",
]


def _int8_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    x_outlier: Tensor,
    outlier_columns: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    w_int8 = unpack_weight(weight, w_scale.shape[0], x_int8.shape[-1])
    return linear_reference(x_int8, x_scale, x_outlier, outlier_columns, w_int8, w_scale, bias)


def _fake(x_int8, x_scale, x_outlier, outlier_columns, weight, w_scale, bias) -> Tensor:
    shape = (*x_int8.shape[:-1], w_scale.shape[0])
    return torch.empty(shape, dtype=x_outlier.dtype, device=x_int8.device)


def _setup(ctx, inputs, output) -> None:
    x_int8, _, _, _, weight, w_scale, bias = inputs
    ctx.save_for_backward(weight, w_scale)
    ctx.K = x_int8.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    weight, w_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_x = input_gradient(grad, weight, w_scale, ctx.K)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return None, None, grad_x, None, None, None, grad_bias


int8_linear = register(
    "int8_linear(Tensor x_int8, Tensor x_scale, Tensor x_outlier, Tensor? outlier_columns, "
    "Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor",
    _int8_linear,
    _fake,
    _setup,
    _backward,
)
