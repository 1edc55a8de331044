"""The int8 product with its outliers, for M >= 17: one launch for up to three linears of one input.

    y = ((x_int8 @ w_int8ᵀ) · x_scale + x_gathered @ w_gatheredᵀ) · w_scale + bias

Weights are ``[N, K]`` row-major, which is the K-major operand that int8 tensor cores ask for. The order
is for the registers' sake: the int8 loop first, its int32 accumulator converted to fp32 in place, the
outlier product accumulated into the same registers. With the outliers first, two accumulators are
alive at once, and spill.

With few tiles, SPLIT_K programs share one, each with its part of K and of the outliers (``split.py``).
With many, some have EXTRA_M rows more (``tall.py``).

Source: Dettmers et al. 2022, "LLM.int8()", equation 8. Reference: ``kernels/ops/linear_reference.py``.
"""

import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.split import sum_of_large_tile
from int8fx.kernels.gpu.tall import tall_tile
from int8fx.kernels.gpu.tiles import scaled_rows, store_tile, wrapped_range


def gemm_reference(
    x_int8: Tensor,
    x_scale: Tensor,
    x_gathered: Tensor,
    w_gathered: Tensor,
    w_int8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The formula above for one weight, in float64.

    Args:
        x_int8: ``[M, K]`` int8.
        x_scale: ``[M]`` fp32.
        x_gathered: ``[M, count]``.
        w_gathered: ``[N, count]``.
        w_int8: ``[N, K]`` int8.
        w_scale: ``[N]`` fp32.
        bias: ``[N]`` or None.

    Returns:
        ``[M, N]`` float64.
    """
    y = (x_int8.double() @ w_int8.double().t()) * x_scale.double().unsqueeze(1)
    y = (y + x_gathered.double() @ w_gathered.double().t()) * w_scale.double()
    return y if bias is None else y + bias.double()


@triton.jit
def tile_in_bands(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tiles in bands of GROUP_M rows of tiles, so that the tiles in flight share operands in L2."""
    band = program // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return band * GROUP_M + within % height, within // height


@triton.jit
def _place(
    tall, M, tiles_n, BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """Of this program's tile: its first row, its column of tiles, and whether it is tall.

    Tall tiles are the upper ones. They come first, so that short ones fill what is left at the end.
    """
    program, first_row, is_tall = tl.program_id(0), 0, False
    height, tiles_m = BLOCK_M, tl.cdiv(M, BLOCK_M)
    if EXTRA_M:
        is_tall = program < tall * tiles_n
        end = tall * (BLOCK_M + EXTRA_M)
        program = tl.where(is_tall, program, program - tall * tiles_n)
        first_row = tl.where(is_tall, 0, end)
        height = tl.where(is_tall, BLOCK_M + EXTRA_M, BLOCK_M)
        tiles_m = tl.where(is_tall, tall, tl.cdiv(M - end, BLOCK_M))
    tile_m, tile_n = tile_in_bands(program, tiles_m, tiles_n, GROUP_M)
    return first_row + tile_m * height, tile_n, is_tall


@triton.jit
def int8_product(
    x_ptr, w_ptr, m, n, first, last, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """``x_int8[m] @ w_int8[n]ᵀ`` in int32, of columns ``first`` to ``last``."""
    k = first + tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    w_tile = w_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
    acc_int32 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(first, last, BLOCK_K * UNROLL):
        for step in tl.static_range(UNROLL):
            if EVEN_K:
                x, w = tl.load(x_tile), tl.load(w_tile)
            else:
                inside = start + step * BLOCK_K + tl.arange(0, BLOCK_K) < K
                x = tl.load(x_tile, mask=inside[None, :], other=0)
                w = tl.load(w_tile, mask=inside[:, None], other=0)
            acc_int32 = tl.dot(x, w, acc_int32, out_dtype=tl.int32)
            x_tile += BLOCK_K
            w_tile += BLOCK_K
    return acc_int32


@triton.jit
def _add_outliers(
    acc, x_ptr, w_ptr, m, w_rows, first, last, CAPACITY,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + x_gathered[m] @ w_gathered[w_rows]ᵀ``, of gathered columns ``first`` to ``last``."""
    j = first + tl.arange(0, BLOCK_O)
    x_tile = x_ptr + m.to(tl.int64)[:, None] * CAPACITY + j[None, :]
    w_tile = w_ptr + w_rows.to(tl.int64)[None, :] * CAPACITY + j[:, None]
    for _ in range(first, last, BLOCK_O):
        acc = tl.dot(tl.load(x_tile), tl.load(w_tile), acc, input_precision=PRECISION)
        x_tile += BLOCK_O
        w_tile += BLOCK_O
    return acc


@triton.jit
def _tile(
    start_m, start_n, x_int8_ptr, x_scale_ptr, x_gathered_ptr, w_gathered_ptr, count_ptr,
    parts_ptr, counters_ptr, w_ptr, w_scale_ptr, bias_ptr, y_ptr, w_offset, M, N, K, CAPACITY,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
    SPLIT_K: tl.constexpr, UNROLL: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of one linear, or a part of their sum."""
    m, n = wrapped_range(start_m, M, BLOCK_M), wrapped_range(start_n, N, BLOCK_N)
    part, first, last = 0, 0, K
    if SPLIT_K > 1:
        part = tl.program_id(1)
        length = tl.cdiv(tl.cdiv(K, BLOCK_K * UNROLL), SPLIT_K) * (BLOCK_K * UNROLL)
        first = part * length
        last = tl.minimum(first + length, K)
    acc_int32 = int8_product(
        x_int8_ptr, w_ptr, m, n, first, last, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UNROLL
    )
    y = scaled_rows(acc_int32, x_scale_ptr, m)
    if HAS_OUTLIERS:
        first, last = 0, tl.load(count_ptr)
        if SPLIT_K > 1:
            share = tl.cdiv(tl.cdiv(last, BLOCK_O), SPLIT_K) * BLOCK_O
            first = part * share
            last = tl.minimum(first + share, last)
        y = _add_outliers(
            y, x_gathered_ptr, w_gathered_ptr, m, w_offset + n, first, last, CAPACITY,
            BLOCK_O, PRECISION,
        )  # fmt: skip
    wanted = True
    if SPLIT_K > 1:
        y, wanted = sum_of_large_tile(y, part, parts_ptr, counters_ptr, SPLIT_K)
    store_tile(y, start_m, start_n, w_scale_ptr, bias_ptr, y_ptr, wanted, M, N, HAS_BIAS, BLOCK_N)


@triton.jit
def gemm_kernel(
    x_int8_ptr,  # [M, K] int8
    x_scale_ptr,  # [M] fp32
    x_gathered_ptr,  # [M, CAPACITY]
    w_gathered_ptr,  # [N0 + N1 + N2, CAPACITY]
    count_ptr,  # [1] int32
    parts_ptr, counters_ptr,  # see split.py, where SPLIT_K > 1
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    w_scale0_ptr, w_scale1_ptr, w_scale2_ptr,  # [N] fp32
    bias0_ptr, bias1_ptr, bias2_ptr,  # [N], or None
    y0_ptr, y1_ptr, y2_ptr,  # [M, N]
    M, N0, N1, N2, K, CAPACITY,
    tall,  # tiles of BLOCK_M + EXTRA_M rows in each column of tiles, where EXTRA_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EXTRA_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first0 = tl.cdiv(N0, BLOCK_N)
    first1 = first0 + tl.cdiv(N1, BLOCK_N)
    tiles_n = first1 + tl.cdiv(N2, BLOCK_N)
    start_m, tile_n, is_tall = _place(tall, M, tiles_n, BLOCK_M, EXTRA_M, GROUP_M)
    N, w_ptr, w_scale_ptr, bias_ptr, y_ptr = N0, w0_ptr, w_scale0_ptr, bias0_ptr, y0_ptr
    w_offset = 0
    if GROUPED:
        group = (tile_n >= first0).to(tl.int32) + (tile_n >= first1).to(tl.int32)
        tile_n -= pick(group, 0, first0, first1)
        N = pick(group, N0, N1, N2)
        w_offset = pick(group, 0, N0, N0 + N1)
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        w_scale_ptr = pick(group, w_scale0_ptr, w_scale1_ptr, w_scale2_ptr)
        y_ptr = pick(group, y0_ptr, y1_ptr, y2_ptr)
        if HAS_BIAS:
            bias_ptr = pick(group, bias0_ptr, bias1_ptr, bias2_ptr)
    start_n = tile_n * BLOCK_N
    if EXTRA_M and is_tall:
        tall_tile(
            start_m, start_n, x_int8_ptr, x_scale_ptr, x_gathered_ptr, w_gathered_ptr, count_ptr,
            w_ptr, w_scale_ptr, bias_ptr, y_ptr, w_offset, M, N, K, CAPACITY,
            BLOCK_M, EXTRA_M, BLOCK_N, BLOCK_K, BLOCK_O, EVEN_K, HAS_BIAS, HAS_OUTLIERS, PRECISION,
        )  # fmt: skip
    else:
        _tile(
            start_m, start_n, x_int8_ptr, x_scale_ptr, x_gathered_ptr, w_gathered_ptr, count_ptr,
            parts_ptr, counters_ptr, w_ptr, w_scale_ptr, bias_ptr, y_ptr, w_offset, M, N, K, CAPACITY,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_O, SPLIT_K, UNROLL, EVEN_K, HAS_BIAS, HAS_OUTLIERS,
            PRECISION,
        )  # fmt: skip
