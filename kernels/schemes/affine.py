"""Activations with a zero point, or with one scale for all of them.

    x̂ = (x_int8 + zero) · x_scale + x_outlier        ŵ = w_int8 · w_scale[n]

``x_offset = zero · x_scale`` is a number for each row, so what it adds to the product is of rank 1:

    y = int8_linear(x_int8, x_scale, x_outlier, ...) + x_offset[m] · w_sum[n],   w_sum = Σ_k ŵ[n, k]

The zero point is a whole number, as in the paper, so that an outlier's place holds exactly 0. Weights
stay symmetric: theirs are, and the paper's gain is from activations such as ReLU's.

``w_sum`` is an fp32 sum, as is that of the product before w_scale. Where one is above the largest
float, the result is not finite.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.format import ROWS, Part, WeightFormat
from int8fx.kernels.formats.int8 import PER_CHANNEL, PER_TENSOR
from int8fx.kernels.gpu import composed
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.quantize_reference import MIN_SCALE, QMAX, split_outliers
from int8fx.kernels.schemes.int8 import NO_OUTLIERS, Outliers
from int8fx.kernels.schemes.scheme import Call, Lowering, Scheme
from int8fx.kernels.schemes.settings import NoSettings

# Rounding x / scale and the zero point moves an end of the range by a whole step at most.
_RANGE = QMAX - 0.5
# A row that is far from zero and hardly varies: beyond this, fp32 has no fractions of a step.
_FINEST = 2.0**-22


def quantize_affine_reference(
    x: Tensor, threshold: float, decomposition: str, per_tensor: bool, zero_point: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """int8 of ``x`` with its outliers taken out, in plain PyTorch.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        threshold, decomposition: as of ``kernels/ops/quantize_reference.py``. An outlier counts as 0
        in the range.
        per_tensor: one scale for all rows, or one each.
        zero_point: the middle of the range is not 0.

    Returns:
        ``x_int8 [*, K]`` int8, ``x_scale [*]`` fp32, ``x_offset [*]`` fp32 (0 without zero point),
        ``x_outlier [*, K]`` of x's dtype and ``outlier_columns [K]`` bool; the last two are empty
        with threshold 0. |x - x̂| <= x_scale / 2, and one step at the ends of a range whose
        middle is not 0.
    """
    regular, x_outlier, outlier_columns = split_outliers(x, threshold, decomposition)
    over = tuple(range(x.dim())) if per_tensor else (-1,)
    low, high = _range(regular, over)
    largest = torch.maximum(low.abs(), high.abs())
    if zero_point:
        scale = torch.maximum((high / 2 - low / 2) / _RANGE, largest * _FINEST).clamp_min(MIN_SCALE)
        zero = torch.round((high / 2 + low / 2) / scale)
    else:
        scale = (largest / QMAX).clamp_min(MIN_SCALE)
        zero = torch.zeros_like(scale)
    x_int8 = (torch.round(regular / scale) - zero).clamp(-QMAX, QMAX).to(torch.int8)
    rows = regular.shape[:-1]
    x_scale = scale.squeeze(-1).expand(rows).contiguous()
    x_offset = (zero * scale).squeeze(-1).expand(rows).contiguous()
    return x_int8, x_scale, x_offset, x_outlier, outlier_columns


def _range(values: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The least and the largest along dimensions, which become 1; of no values, 0."""
    if values.numel() == 0:
        nothing = values.sum(over, keepdim=True)
        return nothing, nothing
    return values.amin(over, keepdim=True), values.amax(over, keepdim=True)


def _fake(x: Tensor, threshold: float, decomposition: str, *how: bool) -> tuple[Tensor, ...]:
    x_int8, x_scale, x_outlier, outlier_columns = ops.quantize(x, threshold, decomposition)
    return x_int8, x_scale, torch.empty_like(x_scale), x_outlier, outlier_columns


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x_int8, x_scale, x_offset, _, outlier_columns = output
    ctx.decomposed = inputs[1] != 0
    ctx.mark_non_differentiable(x_int8, x_scale, x_offset, outlier_columns)


def _backward(ctx: Any, *grads: Any) -> tuple:
    """Straight-through, carried by ``x_outlier``; see ``kernels/ops/int8_linear.py``."""
    return (grads[3] if ctx.decomposed else None), None, None, None, None


quantize_affine = register(
    "quantize_affine(Tensor x, float threshold, str decomposition, bool per_tensor, bool zero_point) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    quantize_affine_reference,
    _fake,
    _setup,
    _backward,
)


SUM = Part("sum", torch.float32, (ROWS,))


def with_sums(weight_format: WeightFormat) -> WeightFormat:
    """The format, and ``w_sum [N]`` fp32 derived from it, which a zero point of x meets."""

    def derive(stored: Sequence[Tensor], N: int, K: int) -> tuple[Tensor, ...]:
        w_int8, w_scale = stored
        return (w_int8.sum(-1, dtype=torch.int32) * w_scale,)

    name = f"{weight_format.name}, with sums"
    stored_as = weight_format.files
    return replace(weight_format, name=name, stored_as=stored_as, derived=(SUM,), derive=derive)


def _lowering(per_tensor: bool, zero_point: bool, decomposed: bool) -> Lowering:
    def lower(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Any) -> Any:
        outliers = settings if decomposed else NO_OUTLIERS
        threshold, decomposition = outliers.threshold, outliers.decomposition
        quantized = call(quantize_affine, x, threshold, decomposition, per_tensor, zero_point)
        x_int8, x_scale, x_offset, x_outlier, columns = (
            call(operator.getitem, quantized, index) for index in range(5)
        )
        if threshold == 0:
            # x stands in for its outliers: it carries the dtype and the gradient.
            x_outlier, columns = x, None
        if not zero_point:
            return call(ops.int8_linear, x_int8, x_scale, x_outlier, columns, *weight, bias)
        # Both terms may be large and of opposite sign: they meet in fp32.
        x_outlier = call(torch.ops.aten.to.dtype, x_outlier, torch.float32)
        packed, w_scale, w_sum = weight
        y = call(ops.int8_linear, x_int8, x_scale, x_outlier, columns, packed, w_scale, bias)
        correction = call(torch.mul, call(torch.unsqueeze, x_offset, -1), w_sum)
        return call(_as_dtype_of, call(torch.add, y, correction), x)

    return lower


_as_dtype_of = torch.ops.aten.type_as.default


def _dequantized_input(per_tensor: bool, zero_point: bool, decomposed: bool) -> Any:
    def dequantized(x: Tensor, settings: Any) -> Tensor:
        outliers = settings if decomposed else NO_OUTLIERS
        x_int8, x_scale, x_offset, x_outlier, _ = quantize_affine_reference(
            x, outliers.threshold, outliers.decomposition, per_tensor, zero_point
        )
        x_hat = x_int8.double() * x_scale.double().unsqueeze(-1) + x_offset.double().unsqueeze(-1)
        return x_hat + x_outlier if outliers.threshold else x_hat

    return dequantized


def _scheme(
    name: str,
    formula: str,
    weight_format: WeightFormat,
    *,
    per_tensor: bool = False,
    zero_point: bool = False,
    decomposed: bool = False,
) -> Scheme:
    stored = with_sums(weight_format) if zero_point else weight_format
    return Scheme(
        name,
        formula,
        "Dettmers et al. 2022, arXiv 2208.07339, section 2 and Table 1",
        lambda settings: stored,
        Outliers if decomposed else NoSettings,
        _dequantized_input(per_tensor, zero_point, decomposed),
        _lowering(per_tensor, zero_point, decomposed),
        quantize_affine,
        {quantize_affine: quantize_affine_reference, ops.int8_linear: composed.int8_linear},
        operator=table.INT8_LINEAR,
    )


ABSMAX_TENSOR = _scheme("absmax-tensor", "one scale for x, one for w", PER_TENSOR, per_tensor=True)
ZEROPOINT_TENSOR = _scheme(
    "zeropoint-tensor",
    "one scale and zero point for x, one scale for w",
    PER_TENSOR,
    per_tensor=True,
    zero_point=True,
)
ZEROPOINT_VECTOR = _scheme(
    "zeropoint-vector", "per-token x with zero points, per-channel w", PER_CHANNEL, zero_point=True
)
LLM_INT8_ZEROPOINT = _scheme(
    "llm.int8-zeropoint",
    "per-token x with zero points, per-channel w, outliers of x in 16-bit",
    PER_CHANNEL,
    zero_point=True,
    decomposed=True,
)
