"""Decode: the whole linear in one launch, for M <= 16.

    y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias,    from x itself

Reading the weight is all the time there is, and a launch costs as much as reading several MB. Outliers
multiply the weight's tile that is in registers anyway, in blocks that have any.

Where rows quantise alone (one row, or the token decomposition), the kernel that computes x does it,
and this one is given ``x_int8, x_scale`` and ``x_outlier``. Otherwise (QUANTIZE) each program quantises
for itself: it looks at all of x once, for the scales (x is small and stays in L2), and quantises each
block of columns again when the product arrives there. All rows are in one tile, so even the column
decomposition needs no other program.

**Split K.** With few output channels there are fewer tiles than multiprocessors. Then SPLIT_K programs
share a tile, each with its part of K, and the result is ``[SPLIT_K, M, N]`` partial sums in fp32,
whose sum Inductor fuses with what reads ``y``. No atomics: the order of summation is fixed.

Source: Dettmers et al. 2022, "LLM.int8()", equation 8. References: ``kernels/quantize.py`` and
``kernels/linear.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.rounding import quantize, scale_of_rows
from int8fx.kernels.linear import linear_reference
from int8fx.kernels.quantize import quantize_reference

MAX_M = 16


def quantized_linear_reference(
    x: Tensor,
    threshold: float,
    decomposition: str,
    w_int8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The formula above in plain PyTorch: ``[M, K]`` in, ``[M, N]`` of x's dtype out."""
    x_int8, x_scale, x_outlier, columns = quantize_reference(x, threshold, decomposition)
    without = threshold == 0
    return linear_reference(
        x_int8,
        x_scale,
        x if without else x_outlier,
        None if without else columns,
        w_int8,
        w_scale,
        bias,
    )


def sum_of_parts(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y`` of the partial sums ``[SPLIT_K, M, N]``.

    Term by term, which Inductor fuses with whatever reads ``y``; a reduction would be a launch.
    """
    y, *others = parts.unbind(0)
    for part in others:
        y = y + part
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


@triton.jit
def _outliers(x, threshold, COLUMN: tl.constexpr):
    """Which elements of a block of columns, all rows of it, leave the int8 product."""
    taken = tl.abs(x) >= threshold
    if COLUMN:
        taken = tl.broadcast_to((tl.max(taken.to(tl.int32), 0) != 0)[None, :], x.shape)
    return taken


@triton.jit
def _row_scales(
    x_ptr, M, K, threshold,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, COLUMN: tl.constexpr, HAS_OUTLIERS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    absmax = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (row < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_OUTLIERS:
            x = tl.where(_outliers(x, threshold, COLUMN), 0.0, x)
        absmax = tl.maximum(absmax, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    return scale_of_rows(absmax)


@triton.jit
def decode_kernel(
    x_ptr,  # [M, K], x_outlier unless QUANTIZE
    x_int8_ptr,  # [M, K] int8, unless QUANTIZE
    x_scale_ptr,  # [M] fp32, unless QUANTIZE
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    w_scale0_ptr, w_scale1_ptr, w_scale2_ptr,  # [N] fp32
    bias0_ptr, bias1_ptr, bias2_ptr,  # [N], or None
    y0_ptr, y1_ptr, y2_ptr,  # [M, N], or [SPLIT_K, M, N] fp32
    M, N0, N1, N2, K,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    tile_n, part = tl.program_id(0), tl.program_id(1)
    N, w_ptr, w_scale_ptr, bias_ptr, y_ptr = N0, w0_ptr, w_scale0_ptr, bias0_ptr, y0_ptr
    if GROUPED:
        first0 = tl.cdiv(N0, BLOCK_N)
        first1 = first0 + tl.cdiv(N1, BLOCK_N)
        group = (tile_n >= first0).to(tl.int32) + (tile_n >= first1).to(tl.int32)
        tile_n -= pick(group, 0, first0, first1)
        N = pick(group, N0, N1, N2)
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        w_scale_ptr = pick(group, w_scale0_ptr, w_scale1_ptr, w_scale2_ptr)
        y_ptr = pick(group, y0_ptr, y1_ptr, y2_ptr)
        if HAS_BIAS:
            bias_ptr = pick(group, bias0_ptr, bias1_ptr, bias2_ptr)
    row = tl.arange(0, BLOCK_M)
    if QUANTIZE:
        x_scale = _row_scales(x_ptr, M, K, limit, BLOCK_M, SCALE_BLOCK, COLUMN, HAS_OUTLIERS)
    else:
        x_scale = tl.load(x_scale_ptr + row, mask=row < M, other=0.0)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.max_contiguous(tl.multiple_of(columns % N, BLOCK_N), BLOCK_N)
    acc_int32 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    outlier_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    for start in range(part * length, tl.minimum(part * length + length, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_tile = w_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
        inside = (row < M)[:, None] & (k < K)[None, :]
        x_tile = row[:, None] * K + k[None, :]
        w = tl.load(w_tile) if EVEN_K else tl.load(w_tile, mask=(k < K)[:, None], other=0)
        if HAS_OUTLIERS or QUANTIZE:
            x = tl.load(x_ptr + x_tile, mask=inside, other=0.0)
        if HAS_OUTLIERS:
            value = x.to(tl.float32)
            taken = _outliers(value, limit, COLUMN) if QUANTIZE else value != 0
            if tl.max(tl.max(taken.to(tl.int32), 1), 0) != 0:
                x_outlier = tl.where(taken, x, 0.0).to(x_ptr.dtype.element_ty)
                w16 = w.to(x_ptr.dtype.element_ty)
                outlier_sum = tl.dot(x_outlier, w16, outlier_sum, input_precision=PRECISION)
        if QUANTIZE:
            regular = x.to(tl.float32)
            if HAS_OUTLIERS:
                regular = tl.where(taken, 0.0, regular)
            x_int8 = quantize(regular, x_scale[:, None])
        else:
            x_int8 = tl.load(x_int8_ptr + x_tile, mask=inside, other=0)
        acc_int32 = tl.dot(x_int8, w, acc_int32, out_dtype=tl.int32)

    y = acc_int32.to(tl.float32) * x_scale[:, None] + outlier_sum
    y *= tl.load(w_scale_ptr + n)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    target = y_ptr + (part * M + row)[:, None] * N + columns[None, :]
    inside = (row < M)[:, None] & (columns < N)[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)
