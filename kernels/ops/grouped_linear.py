"""Linears of weights of four bits by groups along K, with x in int8 or as it is.

    grouped_linear         y = x̂ ŵᵀ + x[:, columns] @ w_columns + bias     x̂ = x_int8 · x_scale
    grouped_float_linear   y = x ŵᵀ + bias

    x_int8     round(rotate(rest) / x_scale), rest x with 0 at ``columns``: per token, as of
               ``rotated_linear.py``; with the rotation ``"none"`` rest itself
    ŵ[n, k]    (code[n, k] - zero[n, g]) · scale[n, g], as of ``kernels/formats/grouped.py``

| operator | |
|---|---|
| ``grouped_linear``, ``grouped_linears`` | one linear, or several of one x, which is quantised once |
| ``grouped_float_linear``, ``grouped_float_linears`` | the same with x as it is |

How far a kernel's y may be from the formula, with u = 2⁻²⁴, G groups and C columns:

    (2 (G + C) + 8) u · [Σ_g Σ_k (|scale_g| code_k + |offset_g|) |x̂_k| + Σ_c |x_c w_c| + |bias|]

with offset = -zero · scale. The sum of a group is exact in int32, and meets its scale and its offset in
two fused products. With x as it is, a group's sums are in fp32: its width is added to the factor. Then
y is rounded to x's dtype. Sums over groups are in fp32 before they meet x_scale: where one is above the
largest float, y is not finite.

**Gradients** are straight-through: that of x is ``grad @ ŵ``, ŵ rotated back, with its columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.codes import codes_in_a_byte, unpack_bits
from int8fx.kernels.formats.grouped import WHOLE, dequantize_codes
from int8fx.kernels.formats.rotated_groups import dequantize_rotated
from int8fx.kernels.ops.gradients import bias_gradient
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.rotated_linear import check_rotation, quantize_rotated_reference
from int8fx.kernels.ops.rotation import NONE, rotated_columns

BITS = 4
FAMILY = f"{BITS}-bit by groups"
# As the kernel table calls them.
INT8_ROWS, FLOAT_ROWS = OPERATORS = "grouped_linear", "grouped_float_linear"


def stored_bytes(K: int, group: int) -> int:
    """The columns of ``packed`` as it is stored, of a weight of K columns after the rotation."""
    width = 1 if group == WHOLE else group
    step = max(codes_in_a_byte(BITS), width)
    return -(-K // step) * step // codes_in_a_byte(BITS)


def dequantized(packed: Tensor, grid: Sequence[Tensor], group: int, zeros: str, K: int) -> Tensor:
    """ŵ ``[N, K]`` fp32 of a packed weight that is not rotated, or before it is rotated back.

    Args:
        packed: as the kernel of its device takes it, or as it is stored.
        grid: ``scale [N, G]``, and zero points or offsets where ``zeros`` has some.
    """
    codes = _codes(packed, grid[0].shape[0], K, group)
    return dequantize_codes(codes, BITS, group, zeros, grid, K)


def _codes(packed: Tensor, N: int, K: int, group: int) -> Tensor:
    shape = N, stored_bytes(K, group)
    stored = packed if tuple(packed.shape) == shape else table.unpack(packed, *shape, FAMILY)
    return unpack_bits(stored, BITS)


def _grid(scale: Tensor, zero_point: Tensor | None) -> list[Tensor]:
    return [scale] if zero_point is None else [scale, zero_point]


# --- x in int8 ------------------------------------------------------------------------------------


def grouped_linear_reference(
    x: Tensor,
    group: int,
    zeros: str,
    block: int,
    rotation: str,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    w_columns: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The first formula, in plain PyTorch: ``[*, N]`` of x's dtype.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        group, zeros: as of ``kernels/formats/grouped.py``.
        block, rotation: as of ``kernels/ops/rotation.py``.
        packed: codes of the rotated weight.
        scale, zero_point: ``[N, G]``; ``zero_point`` are offsets where ``zeros`` says so.
        w_columns, columns: ``[C, N]`` and ``[C]`` int32, ascending; or neither.
    """
    check_rotation(0.0, block, rotation)
    at = x.new_empty(0, dtype=torch.int32) if columns is None else columns
    x_int8, x_scale, _, x_columns = quantize_rotated_reference(x, at, 0.0, block, rotation)
    w_hat = dequantized(packed, _grid(scale, zero_point), group, zeros, x_int8.shape[-1])
    y = F.linear(x_int8.float(), w_hat) * x_scale.unsqueeze(-1)
    if w_columns is not None:
        y = y + x_columns.float() @ w_columns.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _at(tensors: Sequence[Tensor], index: int) -> Tensor | None:
    return tensors[index] if tensors else None


def _grouped_linears(
    x: Tensor,
    group: int,
    zeros: str,
    block: int,
    rotation: str,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    *others: Sequence[Tensor],
) -> list[Tensor]:
    how = group, zeros, block, rotation
    return [
        grouped_linear_reference(x, *how, weight, scale, *(_at(each, index) for each in others))
        for index, (weight, scale) in enumerate(zip(weights, scales, strict=True))
    ]


def _output(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], scale.shape[0]), dtype=x.dtype, device=x.device)


def _fake(x, group, zeros, block, rotation, weight, scale, *others) -> Tensor:
    return _output(x, scale)


def _fakes(x, group, zeros, block, rotation, weights, scales, *others) -> list[Tensor]:
    return [_output(x, scale) for scale in scales]


def _input_gradient(
    grad: Tensor, how: tuple[int, str, int, str], K: int, *parts: Tensor | None
) -> Tensor:
    group, zeros, block, rotation = how
    weight, scale, zero_point, w_columns, columns = parts
    assert weight is not None and scale is not None
    codes = _codes(weight, scale.shape[0], rotated_columns(K, block, rotation), group)
    grid = _grid(scale, zero_point)
    w_hat = dequantize_rotated(codes, BITS, group, zeros, grid, K, block, rotation)
    if w_columns is not None and columns is not None:
        w_hat = w_hat.index_copy(1, columns.long(), w_columns.t().float())
    return grad @ w_hat.to(grad.dtype)


def _input_gradient_fake(grad, group, zeros, block, rotation, K, *parts) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], K))


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, *how, weight, scale, zero_point, w_columns, columns, bias = inputs
    ctx.save_for_backward(weight, scale, zero_point, w_columns, columns)
    ctx.how, ctx.K, ctx.bias_dtype = how, x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grad_x = grouped_linear_backward(grad, *ctx.how, ctx.K, *ctx.saved_tensors)
    grad_bias = None if ctx.bias_dtype is None else bias_gradient(grad, ctx.bias_dtype)
    return grad_x, *[None] * 9, grad_bias


def grouped_linears_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, *how, weights, scales, zero_points, w_columns, columns, biases = inputs
    ctx.lengths = [len(each) for each in (weights, scales, zero_points, w_columns, columns)]
    ctx.save_for_backward(*weights, *scales, *zero_points, *w_columns, *columns)
    ctx.how, ctx.K, ctx.bias_dtypes = how, x.shape[-1], [bias.dtype for bias in biases]


def grouped_linears_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple:
    saved = iter(ctx.saved_tensors)
    parts = [[next(saved) for _ in range(length)] for length in ctx.lengths]
    grad_x = sum(
        grouped_linear_backward(grad, *ctx.how, ctx.K, *(_at(each, index) for each in parts))
        for index, grad in enumerate(grads)
    )
    pairs = zip(grads, ctx.bias_dtypes, strict=False)
    grad_biases = [bias_gradient(grad, dtype) for grad, dtype in pairs]
    return grad_x, *[None] * 4, *([None] * length for length in ctx.lengths), grad_biases


def _grouped_linear_backward(grad, group, zeros, block, rotation, K, *parts) -> Tensor:
    return _input_gradient(grad, (group, zeros, block, rotation), K, *parts)


_HOW = "int group, str zeros, int block, str rotation"
grouped_linear_backward = register(
    f"grouped_linear_backward(Tensor grad, {_HOW}, SymInt K, Tensor weight, Tensor scale, "
    "Tensor? zero_point, Tensor? w_columns, Tensor? columns) -> Tensor",
    _grouped_linear_backward,
    _input_gradient_fake,
)
grouped_linear = register(
    f"grouped_linear(Tensor x, {_HOW}, Tensor weight, Tensor scale, Tensor? zero_point, "
    "Tensor? w_columns, Tensor? columns, Tensor? bias) -> Tensor",
    grouped_linear_reference,
    _fake,
    _setup,
    _backward,
)
grouped_linears = register(
    f"grouped_linears(Tensor x, {_HOW}, Tensor[] weights, Tensor[] scales, Tensor[] zero_points, "
    "Tensor[] w_columns, Tensor[] columns, Tensor[] biases) -> Tensor[]",
    _grouped_linears,
    _fakes,
    grouped_linears_setup,
    grouped_linears_backward,
)


# --- x as it is -----------------------------------------------------------------------------------


def grouped_float_linear_reference(
    x: Tensor,
    group: int,
    zeros: str,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The second formula, in plain PyTorch, in x's dtype."""
    w_hat = dequantized(packed, _grid(scale, zero_point), group, zeros, x.shape[-1]).to(x.dtype)
    return F.linear(x, w_hat, None if bias is None else bias.to(x.dtype))


def _grouped_float_linears(
    x: Tensor,
    group: int,
    zeros: str,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    *others: Sequence[Tensor],
) -> list[Tensor]:
    return [
        grouped_float_linear_reference(
            x, group, zeros, weight, scale, *(_at(each, index) for each in others)
        )
        for index, (weight, scale) in enumerate(zip(weights, scales, strict=True))
    ]


def _float_fake(x, group, zeros, weight, scale, *others) -> Tensor:
    return _output(x, scale)


def _float_fakes(x, group, zeros, weights, scales, *others) -> list[Tensor]:
    return [_output(x, scale) for scale in scales]


def _float_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, *how, weight, scale, zero_point, bias = inputs
    _setup(ctx, (x, *how, 0, NONE, weight, scale, zero_point, None, None, bias), output)


def _float_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_x, *_, grad_bias = _backward(ctx, grad)
    return grad_x, *[None] * 5, grad_bias


def grouped_float_linears_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, *how, weights, scales, zero_points, biases = inputs
    grouped_linears_setup(ctx, (x, *how, 0, NONE, weights, scales, zero_points, [], [], biases), output)


def grouped_float_linears_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple:
    grad_x, *_, weights, scales, zero_points, _, _, biases = grouped_linears_backward(ctx, grads)
    return grad_x, None, None, weights, scales, zero_points, biases


grouped_float_linear = register(
    "grouped_float_linear(Tensor x, int group, str zeros, Tensor weight, Tensor scale, "
    "Tensor? zero_point, Tensor? bias) -> Tensor",
    grouped_float_linear_reference,
    _float_fake,
    _float_setup,
    _float_backward,
)
grouped_float_linears = register(
    "grouped_float_linears(Tensor x, int group, str zeros, Tensor[] weights, Tensor[] scales, "
    "Tensor[] zero_points, Tensor[] biases) -> Tensor[]",
    _grouped_float_linears,
    _float_fakes,
    grouped_float_linears_setup,
    grouped_float_linears_backward,
)
