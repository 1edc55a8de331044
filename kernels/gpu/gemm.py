"""The int8 product with its outliers, for M >= 17: one launch for up to three linears of one input.

    y = ((x_int8 @ w_int8ᵀ) · x_scale + x_gathered @ w_gatheredᵀ) · w_scale + bias

Weights are ``[N, K]`` row-major, which is the K-major operand that int8 tensor cores ask for. The order
is for the registers' sake: the int8 loop first, its int32 accumulator converted to fp32 in place, the
outlier product accumulated into the same registers. With the outliers first, two accumulators are
alive at once, and spill.

With few tiles, SPLIT_K programs share one, each with its part of K and of the outliers (``split.py``).
With many, some have EXTRA_M rows more (``mixed_tiles.py``).

Source: Dettmers et al. 2022, "LLM.int8()", equation 8. Reference: ``kernels/ops/linear_reference.py``.
"""

import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.mixed_tiles import extended_tile
from int8fx.kernels.gpu.split import sum_of_large_tile
from int8fx.kernels.gpu.tiles import BLOCK_O, STEP_O, scaled_rows, store_tile, wrapped_range


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
    extended, M, tiles_n, BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """Of this program's tile: its first row, its column of tiles, and whether it is extended.

    Extended tiles are the upper ones. They come first, so that plain ones fill what is left at the end.
    """
    program, first_row, is_extended = tl.program_id(0), 0, False
    height, tiles_m = BLOCK_M, tl.cdiv(M, BLOCK_M)
    if EXTRA_M:
        is_extended = program < extended * tiles_n
        end = extended * (BLOCK_M + EXTRA_M)
        program = tl.where(is_extended, program, program - extended * tiles_n)
        first_row = tl.where(is_extended, 0, end)
        height = tl.where(is_extended, BLOCK_M + EXTRA_M, BLOCK_M)
        tiles_m = tl.where(is_extended, extended, tl.cdiv(M - end, BLOCK_M))
    tile_m, tile_n = tile_in_bands(program, tiles_m, tiles_n, GROUP_M)
    return first_row + tile_m * height, tile_n, is_extended


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
def part_of_range(length, part, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """The first and the last of a part's share of a range, in whole blocks."""
    share = tl.cdiv(tl.cdiv(length, BLOCK), SPLIT_K) * BLOCK
    return part * share, tl.minimum(part * share + share, length)


@triton.jit
def _add_outliers(
    acc, outliers, w_ptr, start_m, start_n, part, M, N, K,
    SPLIT_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + x_gathered @ w_gatheredᵀ`` of a tile, or the part of it that is this program's.

    Columns beyond those that there is room for in ``w_gathered`` are read from the weight itself.
    """
    x_gathered_ptr, w_gathered_ptr, columns_ptr, count_ptr, X_CAPACITY, W_CAPACITY = outliers
    m, n = wrapped_range(start_m, M, acc.shape[0]), wrapped_range(start_n, N, acc.shape[1])
    count = tl.load(count_ptr)
    gathered = tl.minimum(count, W_CAPACITY)
    first, last = part_of_range(gathered, part, SPLIT_K, BLOCK_O)
    j = first + tl.arange(0, BLOCK_O)
    x_tile = x_gathered_ptr + m.to(tl.int64)[:, None] * X_CAPACITY + j[None, :]
    w_tile = w_gathered_ptr + n.to(tl.int64)[None, :] * W_CAPACITY + j[:, None]
    for _ in range(first, last, BLOCK_O):
        acc = tl.dot(tl.load(x_tile), tl.load(w_tile), acc, input_precision=PRECISION)
        x_tile += BLOCK_O
        w_tile += BLOCK_O
    first, last = part_of_range(count - gathered, part, SPLIT_K, BLOCK_O)
    x_row = x_gathered_ptr + start_m.to(tl.int64) * X_CAPACITY
    w_row = w_ptr + start_n.to(tl.int64) * K
    m = tl.minimum(tl.arange(0, acc.shape[0]), M - 1 - start_m) * X_CAPACITY
    n = tl.minimum(tl.arange(0, acc.shape[1]), N - 1 - start_n) * K
    return _add_others(
        acc, x_row, w_row, m, n, columns_ptr, gathered + first, gathered + last, count, PRECISION
    )


@triton.jit
def _add_others(acc, x_ptr, w_ptr, m, n, columns_ptr, first, last, count, PRECISION: tl.constexpr):
    """``acc + x_gathered[m, j] @ w[n, columns[j]]ᵀ``, of j from ``first`` to ``last``. Rows are 32-bit
    distances: pointers would be twice the registers."""
    for start in tl.range(first, last, STEP_O, num_stages=1):
        j = tl.arange(0, STEP_O)
        # x is zero from count to the end of its block, so that any column will do there.
        k = tl.load(columns_ptr + start + j, mask=start + j < count, other=0)
        x = tl.load(x_ptr + start + (m[:, None] + j[None, :]))
        w = tl.load(w_ptr + (n[None, :] + k[:, None]))
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile(
    start_m, start_n, rows, outliers, sums, linear, M, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, UNROLL: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of one linear, or a part of their sum.

    Args:
        rows, outliers, sums, linear: as ``gemm_kernel`` makes them of its operands.
    """
    x_int8_ptr, x_scale_ptr = rows
    w_ptr, _, _, _, N = linear
    m, n = wrapped_range(start_m, M, BLOCK_M), wrapped_range(start_n, N, BLOCK_N)
    part, first, last = 0, 0, K
    if SPLIT_K > 1:
        part = tl.program_id(1)
        first, last = part_of_range(K, part, SPLIT_K, BLOCK_K * UNROLL)
    acc_int32 = int8_product(
        x_int8_ptr, w_ptr, m, n, first, last, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UNROLL
    )
    y = scaled_rows(acc_int32, x_scale_ptr, m)
    if HAS_OUTLIERS:
        y = _add_outliers(y, outliers, w_ptr, start_m, start_n, part, M, N, K, SPLIT_K, PRECISION)
    wanted = True
    if SPLIT_K > 1:
        parts_ptr, counters_ptr = sums
        y, wanted = sum_of_large_tile(y, part, parts_ptr, counters_ptr, SPLIT_K)
    store_tile(y, start_m, start_n, linear, wanted, M, HAS_BIAS, BLOCK_N)


@triton.jit
def gemm_kernel(
    x_int8_ptr,  # [M, K] int8
    x_scale_ptr,  # [M] fp32
    x_gathered_ptr,  # [M, X_CAPACITY]
    w_gathered_ptr,  # [N0 + N1 + N2, W_CAPACITY]
    columns_ptr,  # [K] int32
    count_ptr,  # [1] int32
    parts_ptr, counters_ptr,  # see split.py, where SPLIT_K > 1
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    w_scale0_ptr, w_scale1_ptr, w_scale2_ptr,  # [N] fp32
    bias0_ptr, bias1_ptr, bias2_ptr,  # [N], or None
    y0_ptr, y1_ptr, y2_ptr,  # [M, N]
    M, N0, N1, N2, K, X_CAPACITY, W_CAPACITY,
    extended,  # tiles of BLOCK_M + EXTRA_M rows in each column of tiles, where EXTRA_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    start_m, tile_n, is_extended = _place(extended, M, tiles_n, BLOCK_M, EXTRA_M, GROUP_M)
    N, w_ptr, w_scale_ptr, bias_ptr, y_ptr = N0, w0_ptr, w_scale0_ptr, bias0_ptr, y0_ptr
    if GROUPED:
        group = (tile_n >= first0).to(tl.int32) + (tile_n >= first1).to(tl.int32)
        tile_n -= pick(group, 0, first0, first1)
        N = pick(group, N0, N1, N2)
        w_gathered_ptr += pick(group, 0, N0, N0 + N1).to(tl.int64) * W_CAPACITY
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        w_scale_ptr = pick(group, w_scale0_ptr, w_scale1_ptr, w_scale2_ptr)
        y_ptr = pick(group, y0_ptr, y1_ptr, y2_ptr)
        if HAS_BIAS:
            bias_ptr = pick(group, bias0_ptr, bias1_ptr, bias2_ptr)
    start_n = tile_n * BLOCK_N
    rows = (x_int8_ptr, x_scale_ptr)
    outliers = (x_gathered_ptr, w_gathered_ptr, columns_ptr, count_ptr, X_CAPACITY, W_CAPACITY)
    linear = (w_ptr, w_scale_ptr, bias_ptr, y_ptr, N)
    if EXTRA_M and is_extended:
        extended_tile(
            start_m, start_n, rows, outliers, linear, M, K,
            BLOCK_M, EXTRA_M, BLOCK_N, BLOCK_K, EVEN_K, HAS_BIAS, HAS_OUTLIERS, PRECISION,
        )  # fmt: skip
    else:
        _tile(
            start_m, start_n, rows, outliers, (parts_ptr, counters_ptr), linear, M, K,
            BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, UNROLL, EVEN_K, HAS_BIAS, HAS_OUTLIERS, PRECISION,
        )  # fmt: skip
