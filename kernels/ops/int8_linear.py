"""The ``int8fx::`` operators: schemas, fake implementations, gradients, and the plain-PyTorch kernels.

Faster kernels register themselves for their dispatch key and are listed in ``kernels/table.py``;
where none serves, the reference runs.

| operator | formula |
|---|---|
| ``quantize`` | x ≈ x_int8 · x_scale + x_outlier (``kernels/ops/quantize_reference.py``) |
| ``int8_linear`` | ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias |
| ``quantized_linears_cpu`` | ``quantize`` and several ``int8_linear`` of it, in one call |
| ``quantized_linear_cpu`` | the same of one ``int8_linear``, whose result is no list |
| ``pack_weight`` | ``w_int8 [N, K]`` in the form that its device's kernel takes, a copy |
| ``expert_linear`` | each row with the weight of its expert (``kernels/ops/expert_linear.py``) |
| ``unpack_weight`` | the ``[N, K]`` form of a packed weight |

**Gradients** are straight-through: with ŵ = w_int8 · w_scale, the gradient of ``int8_linear``'s input
is ``grad @ ŵ``. It is carried by ``x_outlier``: ``int8_linear`` hands it the gradient of the whole
input, and ``quantize`` passes on what its ``x_outlier`` received, unmasked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels import packing
from int8fx.kernels.ops.gradients import _bias_gradient, input_gradient, linears_backward, linears_setup
from int8fx.kernels.ops.linear_reference import linear_reference
from int8fx.kernels.ops.quantize_reference import quantize_reference

_library = torch.library.Library("int8fx", "DEF")

_library.define(
    "quantize(Tensor x, float threshold, str decomposition) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "int8_linear(Tensor x_int8, Tensor x_scale, Tensor x_outlier, Tensor? outlier_columns, "
    "Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor"
)
_library.define(
    "quantized_linears_cpu(Tensor x, float threshold, str decomposition, "
    "Tensor[] weights, Tensor[] w_scales, Tensor[] biases) -> Tensor[]"
)
_library.define(
    "quantized_linear_cpu(Tensor x, float threshold, str decomposition, "
    "Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor"
)
_library.define("pack_weight(Tensor w_int8, str family='int8') -> Tensor")
_library.define("unpack_weight(Tensor weight, SymInt N, SymInt K, str family='int8') -> Tensor")

quantize = torch.ops.int8fx.quantize.default
int8_linear = torch.ops.int8fx.int8_linear.default
quantized_linears_cpu = torch.ops.int8fx.quantized_linears_cpu.default
quantized_linear_cpu = torch.ops.int8fx.quantized_linear_cpu.default
pack_weight = torch.ops.int8fx.pack_weight.default
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


def _int8_linear_setup(ctx, inputs, output) -> None:
    x_int8, _, _, _, weight, w_scale, bias = inputs
    ctx.save_for_backward(weight, w_scale)
    ctx.K = x_int8.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _int8_linear_backward(ctx, grad):
    weight, w_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[2]:
        grad_x = input_gradient(grad, weight, w_scale, ctx.K)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        grad_bias = _bias_gradient(grad, ctx.bias_dtype)
    return None, None, grad_x, None, None, None, grad_bias


_library.impl("int8_linear", _int8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::int8_linear", _int8_linear_fake, lib=_library)
torch.library.register_autograd(
    "int8fx::int8_linear", _int8_linear_backward, setup_context=_int8_linear_setup, lib=_library
)


# --- quantized_linears_cpu ------------------------------------------------------------------------


def _quantized_linears(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    x_int8, x_scale, x_outlier, columns = quantize_reference(x, threshold, decomposition)
    outliers: tuple[Tensor, Tensor | None] = (x, None) if threshold == 0 else (x_outlier, columns)
    all_biases: Sequence[Tensor | None] = biases or [None] * len(weights)
    return [
        _int8_linear(x_int8, x_scale, outliers[0], outliers[1], weight, w_scale, bias)
        for weight, w_scale, bias in zip(weights, w_scales, all_biases, strict=True)
    ]


def _quantized_linears_fake(x, threshold, decomposition, weights, w_scales, biases) -> list[Tensor]:
    shapes = [(*x.shape[:-1], w_scale.shape[0]) for w_scale in w_scales]
    return [torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes]


_library.impl("quantized_linears_cpu", _quantized_linears, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::quantized_linears_cpu", _quantized_linears_fake, lib=_library)
torch.library.register_autograd(
    "int8fx::quantized_linears_cpu", linears_backward, setup_context=linears_setup, lib=_library
)


def _quantized_linear(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    biases = [] if bias is None else [bias]
    return quantized_linears_cpu(x, threshold, decomposition, [weight], [w_scale], biases)[0]


def _quantized_linear_fake(x, threshold, decomposition, weight, w_scale, bias) -> Tensor:
    return torch.empty((*x.shape[:-1], w_scale.shape[0]), dtype=x.dtype, device=x.device)


def _quantized_linear_setup(ctx, inputs, output) -> None:
    x, threshold, decomposition, weight, w_scale, bias = inputs
    biases = [] if bias is None else [bias]
    linears_setup(ctx, (x, threshold, decomposition, [weight], [w_scale], biases), output)


def _quantized_linear_backward(ctx, grad: Tensor) -> tuple:
    grad_x, *_, grad_biases = linears_backward(ctx, [grad])
    return grad_x, None, None, None, None, (grad_biases[0] if grad_biases else None)


_library.impl("quantized_linear_cpu", _quantized_linear, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::quantized_linear_cpu", _quantized_linear_fake, lib=_library)
torch.library.register_autograd(
    "int8fx::quantized_linear_cpu",
    _quantized_linear_backward,
    setup_context=_quantized_linear_setup,
    lib=_library,
)


# --- pack_weight, unpack_weight ------------------------------------------------------------------


_library.impl("pack_weight", packing.pack_weight, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::pack_weight", packing.pack_weight_fake, lib=_library)


_library.impl("unpack_weight", packing.unpack_weight, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::unpack_weight", packing.unpack_weight_fake, lib=_library)
