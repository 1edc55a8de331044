"""The ``int8fx::`` operators: schemas, fake implementations, gradients, and the plain-PyTorch kernels.

Faster kernels register themselves for their dispatch key and are listed in ``kernels/table.py``;
where none serves, the reference runs.

| operator | formula |
|---|---|
| ``quantize`` | x ≈ x_int8 · x_scale + x_outlier (``kernels/quantize.py``) |
| ``int8_linear`` | ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias |
| ``int8_linear_group`` | several ``int8_linear`` of one quantised input |
| ``unpack_weight`` | the ``[N, K]`` form of a packed weight |

**Gradients** are straight-through: with ŵ = w_int8 · w_scale, the gradient of ``int8_linear``'s input
is ``grad @ ŵ``. It is carried by ``x_outlier``: ``int8_linear`` hands it the gradient of the whole
input, and ``quantize`` passes on what its ``x_outlier`` received, unmasked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels.linear import linear_reference
from int8fx.kernels.quantize import quantize_reference

_library = torch.library.Library("int8fx", "DEF")

_library.define(
    "quantize(Tensor x, float threshold, str decomposition) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "int8_linear(Tensor x_int8, Tensor x_scale, Tensor x_outlier, Tensor? outlier_columns, "
    "Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor"
)
_library.define(
    "int8_linear_group(Tensor x_int8, Tensor x_scale, Tensor x_outlier, Tensor? outlier_columns, "
    "Tensor[] weights, Tensor[] w_scales, Tensor?[] biases) -> Tensor[]"
)
_library.define("unpack_weight(Tensor weight, SymInt N, SymInt K) -> Tensor")

quantize = torch.ops.int8fx.quantize.default
int8_linear = torch.ops.int8fx.int8_linear.default
int8_linear_group = torch.ops.int8fx.int8_linear_group.default
unpack_weight = torch.ops.int8fx.unpack_weight.default


# --- quantize ------------------------------------------------------------------------------------


def _quantize(x: Tensor, threshold: float, decomposition: str) -> tuple[Tensor, ...]:
    return quantize_reference(x, threshold, decomposition)


def _quantize_fake(x: Tensor, threshold: float, decomposition: str) -> tuple[Tensor, ...]:
    without = threshold == 0
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
        x.new_empty(0) if without else torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(0 if without else x.shape[-1], dtype=torch.bool),
    )


def _quantize_setup(ctx, inputs, output) -> None:
    _, threshold, _ = inputs
    x_int8, x_scale, _, outlier_columns = output
    ctx.decomposed = threshold != 0
    ctx.mark_non_differentiable(x_int8, x_scale, outlier_columns)


def _quantize_backward(ctx, _int8, _scale, grad_outlier, _columns):
    return (grad_outlier if ctx.decomposed else None), None, None


_library.impl("quantize", _quantize, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::quantize", _quantize_fake, lib=_library)
torch.library.register_autograd(
    "int8fx::quantize", _quantize_backward, setup_context=_quantize_setup, lib=_library
)


# --- int8_linear ---------------------------------------------------------------------------------


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


def _int8_linear_fake(x_int8, x_scale, x_outlier, outlier_columns, weight, w_scale, bias) -> Tensor:
    shape = (*x_int8.shape[:-1], w_scale.shape[0])
    return torch.empty(shape, dtype=x_outlier.dtype, device=x_int8.device)


def _input_gradient(grad: Tensor, weight: Tensor, w_scale: Tensor, K: int) -> Tensor:
    w_int8 = unpack_weight(weight, w_scale.shape[0], K)
    return grad @ (w_int8.to(torch.float32) * w_scale.unsqueeze(1)).to(grad.dtype)


def _bias_gradient(grad: Tensor, bias_dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(bias_dtype)


def _int8_linear_setup(ctx, inputs, output) -> None:
    x_int8, _, _, _, weight, w_scale, bias = inputs
    ctx.save_for_backward(weight, w_scale)
    ctx.K = x_int8.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _int8_linear_backward(ctx, grad):
    weight, w_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_x = _input_gradient(grad, weight, w_scale, ctx.K)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = _bias_gradient(grad, ctx.bias_dtype)
    return None, None, grad_x, None, None, None, grad_bias


_library.impl("int8_linear", _int8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::int8_linear", _int8_linear_fake, lib=_library)
torch.library.register_autograd(
    "int8fx::int8_linear", _int8_linear_backward, setup_context=_int8_linear_setup, lib=_library
)


# --- int8_linear_group ---------------------------------------------------------------------------


def _int8_linear_group(
    x_int8: Tensor,
    x_scale: Tensor,
    x_outlier: Tensor,
    outlier_columns: Tensor | None,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    return [
        _int8_linear(x_int8, x_scale, x_outlier, outlier_columns, *operands)
        for operands in zip(weights, w_scales, biases, strict=True)
    ]


def _int8_linear_group_fake(
    x_int8, x_scale, x_outlier, outlier_columns, weights, w_scales, biases
) -> list[Tensor]:
    return [
        _int8_linear_fake(x_int8, x_scale, x_outlier, outlier_columns, *operands)
        for operands in zip(weights, w_scales, biases, strict=True)
    ]


_library.impl("int8_linear_group", _int8_linear_group, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::int8_linear_group", _int8_linear_group_fake, lib=_library)


# --- unpack_weight -------------------------------------------------------------------------------


def _unpack_weight(weight: Tensor, N: int, K: int) -> Tensor:
    from int8fx.kernels import table

    return table.unpack(weight, N, K)


def _unpack_weight_fake(weight: Tensor, N: int, K: int) -> Tensor:
    return torch.empty((N, K), dtype=torch.int8, device=weight.device)


_library.impl("unpack_weight", _unpack_weight, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::unpack_weight", _unpack_weight_fake, lib=_library)
