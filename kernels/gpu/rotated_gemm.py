"""The product of rotated rows with up to three weights, and of the static columns beside it.

    y = (x_int8 @ w_int8ᵀ) · x_scale · w_scale + x_columns @ w_columns + bias

For any number of rows. With few tiles SPLIT_K programs share one, each with its part of K
(``split.py``). Parts are integers, so a result does not depend on how many there are. The columns'
product starts from what the integers come to, in fp32, in whole steps of a matrix instruction.

Reference: ``kernels/ops/rotated_linear.py``.
"""

import triton
import triton.language as tl

from int8fx.kernels.gpu.gemm import int8_product, part_of_range, tile_in_bands
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.split import halves, sum_of_large_tile
from int8fx.kernels.gpu.tiles import of_columns, scaled_rows, wrapped_range

STEP_C = tl.constexpr(16)  # static columns a step


@triton.jit
def add_columns(
    acc, x_columns_ptr, w_columns_ptr, m, n, N,
    COLUMNS: tl.constexpr, ROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + x_columns[m] @ w_columns[:, n]``. Activations and weights of two dtypes meet in fp32."""
    for start in tl.static_range(0, COLUMNS, STEP_C):
        j = start + tl.arange(0, STEP_C)
        x = tl.load(x_columns_ptr + m.to(tl.int64)[:, None] * ROOM + j[None, :])
        inside = (j < COLUMNS)[:, None] & (n < N)[None, :]
        w = tl.load(w_columns_ptr + j.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0.0)
        if x.dtype != w.dtype:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_piece(
    acc, start_m, start_n, x_columns_ptr, linear, wanted, M,
    HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What of ``y`` is inside the result, WIDTH columns after one another: of each, a thread keeps the
    scale, the bias and the columns' weights in registers.

    Args:
        acc: the integers, in fp32, times the scales of their rows.
        linear: pointers to its scales, columns' weights, bias and result, and N.
    """
    if acc.shape[1] > WIDTH:
        left, right = halves(acc)
        _store_piece(
            left, start_m, start_n, x_columns_ptr, linear, wanted, M,
            HAS_BIAS, COLUMNS, ROOM, PRECISION, WIDTH,
        )  # fmt: skip
        _store_piece(
            right, start_m, start_n + left.shape[1], x_columns_ptr, linear, wanted, M,
            HAS_BIAS, COLUMNS, ROOM, PRECISION, WIDTH,
        )  # fmt: skip
    else:
        w_scale_ptr, w_columns_ptr, bias_ptr, y_ptr, N = linear
        m, n = start_m + tl.arange(0, acc.shape[0]), start_n + tl.arange(0, acc.shape[1])
        y = acc * of_columns(w_scale_ptr, n, N)[None, :]
        if COLUMNS:
            y = add_columns(y, x_columns_ptr, w_columns_ptr, m % M, n, N, COLUMNS, ROOM, PRECISION)
        if HAS_BIAS:
            y += of_columns(bias_ptr, n, N)[None, :]
        target = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(
            target, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :] & wanted
        )


@triton.jit
def rotated_gemm_kernel(
    x_int8_ptr,  # [SETS, M, K] int8
    x_scale_ptr,  # [SETS, M] fp32
    x_columns_ptr,  # [SETS, M, ROOM], zero from COLUMNS on
    sets_ptr,  # [linears] int32, where SETS: the set of each
    parts_ptr, counters_ptr,  # int32, see split.py, where SPLIT_K > 1
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    w_scale0_ptr, w_scale1_ptr, w_scale2_ptr,  # [N] fp32
    w_columns0_ptr, w_columns1_ptr, w_columns2_ptr,  # [COLUMNS, N]
    bias0_ptr, bias1_ptr, bias2_ptr,  # [N], or None
    y0_ptr, y1_ptr, y2_ptr,  # [M, N]
    M, N0, N1, N2, K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUPED: tl.constexpr,
    SETS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROOM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first0 = tl.cdiv(N0, BLOCK_N)
    first1 = first0 + tl.cdiv(N1, BLOCK_N)
    tiles_n = first1 + tl.cdiv(N2, BLOCK_N)
    tile_m, tile_n = tile_in_bands(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    N, w_ptr, w_scale_ptr, bias_ptr, y_ptr = N0, w0_ptr, w_scale0_ptr, bias0_ptr, y0_ptr
    w_columns_ptr = w_columns0_ptr
    if GROUPED:
        group = (tile_n >= first0).to(tl.int32) + (tile_n >= first1).to(tl.int32)
        tile_n -= pick(group, 0, first0, first1)
        N = pick(group, N0, N1, N2)
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        w_scale_ptr = pick(group, w_scale0_ptr, w_scale1_ptr, w_scale2_ptr)
        y_ptr = pick(group, y0_ptr, y1_ptr, y2_ptr)
        if COLUMNS:
            w_columns_ptr = pick(group, w_columns0_ptr, w_columns1_ptr, w_columns2_ptr)
        if HAS_BIAS:
            bias_ptr = pick(group, bias0_ptr, bias1_ptr, bias2_ptr)
        if SETS:
            rows = tl.load(sets_ptr + group).to(tl.int64) * M
            x_int8_ptr += rows * K
            x_scale_ptr += rows
            x_columns_ptr += rows * ROOM
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    m, n = wrapped_range(start_m, M, BLOCK_M), wrapped_range(start_n, N, BLOCK_N)
    part, first, last = 0, 0, K
    if SPLIT_K > 1:
        part = tl.program_id(1)
        first, last = part_of_range(K, part, SPLIT_K, BLOCK_K * UNROLL)
    acc_int32 = int8_product(
        x_int8_ptr, w_ptr, m, n, first, last, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UNROLL
    )
    wanted = True
    if SPLIT_K > 1:
        acc_int32, wanted = sum_of_large_tile(acc_int32, part, parts_ptr, counters_ptr, SPLIT_K)
    linear = (w_scale_ptr, w_columns_ptr, bias_ptr, y_ptr, N)
    _store_piece(
        scaled_rows(acc_int32, x_scale_ptr, m), start_m, start_n, x_columns_ptr, linear, wanted, M,
        HAS_BIAS, COLUMNS, ROOM, PRECISION, 64 if SPLIT_K == 1 else 128,
    )  # fmt: skip
