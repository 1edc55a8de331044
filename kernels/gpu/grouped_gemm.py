"""The product of rows with up to three weights of 4 or 8 bits by groups along K.

    y = Σ_g [(x_g @ code_gᵀ) · scale[n, g] + Σ_k x_g[k] · offset[n, g]] · x_scale
        + x_columns @ w_columns + bias

For any number of rows, of int8 or as they are. No weight is de-quantised: codes are whole numbers that
every dtype of x holds, so the sum of a group's products is taken first, in int32 or fp32, and meets its
scale in fp32. Where the middle code stands for 0 it is subtracted from the codes; where zero points or
offsets are stored, the sum of x in a group meets its offset.

A step of the loop over K reads BLOCK_K codes, of 4 bits as two tiles of half as many columns
(``grouped_packing.py``). Groups that a step divides keep their sums over several steps. In a step with
several groups, whose size 64 does not divide, each tile is a group's or half of it is.

With few tiles SPLIT_K programs share one, each with its part of K (``split.py``). Reference:
``kernels/ops/grouped_linear.py``.
"""

import triton
import triton.language as tl

from int8fx.kernels.gpu.gemm import part_of_range, tile_in_bands
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.rotated_gemm import add_columns
from int8fx.kernels.gpu.split import halves, sum_of_tile
from int8fx.kernels.gpu.tiles import of_columns, wrapped_range


@triton.jit
def _codes(packed, HALF: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, dtype: tl.constexpr):
    """The codes in one half of bytes, less the one in the middle where that stands for 0."""
    ZERO: tl.constexpr = 8 if ZEROS == "middle" else 0
    if BITS == 8:
        return packed.to(dtype)
    half = packed >> 4 if HALF == 1 else packed & 15
    if dtype == tl.float16 or dtype == tl.bfloat16:
        # In the last bits of a number whose steps are 1: a conversion takes four times as long.
        FIRST: tl.constexpr = 1024 if dtype == tl.float16 else 128
        BITS_OF_FIRST: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        return (half.to(tl.int16) | BITS_OF_FIRST).to(dtype, bitcast=True) - (FIRST + ZERO)
    return (half.to(tl.int8) - ZERO).to(dtype)


@triton.jit
def _product(x, codes, total, PRECISION: tl.constexpr):
    """``total + x @ codes``, in int32 or fp32."""
    if x.dtype == tl.int8:
        return tl.dot(x, codes, total, out_dtype=tl.int32)
    else:
        return tl.dot(x, codes, total, input_precision=PRECISION)


@triton.jit
def _scaled(acc, total, x_total, g, rows, inside, G, ZEROS: tl.constexpr):
    """``acc + total · scale[n, g] + x_total · offset[n, g]``"""
    scale_ptr, zero_ptr, distance = rows
    inside = inside & (g < G)
    scale = tl.load(scale_ptr + g + distance, mask=inside, other=0.0).to(tl.float32)
    acc += total.to(tl.float32) * scale[None, :]
    if ZEROS != "middle":
        offset = tl.load(zero_ptr + g + distance, mask=inside, other=0).to(tl.float32)
        if ZEROS != "offset":
            offset = -offset * scale
        acc += x_total.to(tl.float32)[:, None] * offset[None, :]
    return acc


@triton.jit
def _ended(
    sums, k, last, rows, inside, G, GROUP: tl.constexpr, LENGTH: tl.constexpr, ZEROS: tl.constexpr
):  # fmt: skip
    """The sums after LENGTH columns from k, where a group may end; the first is that of ended ones."""
    acc, total, x_total = sums
    scaled = _scaled(acc, total, x_total, k // GROUP, rows, inside, G, ZEROS)
    if GROUP == LENGTH:
        return scaled, tl.zeros_like(total), tl.zeros_like(x_total)
    else:
        ends = ((k + LENGTH) % GROUP == 0) | (k + LENGTH >= last)
        total, x_total = tl.where(ends, 0, total), tl.where(ends, 0, x_total)
        return tl.where(ends, scaled, acc), total, x_total


@triton.jit
def _grouped_sums(
    x_ptr, w_ptr, scale_ptr, zero_ptr, m, start_n, N, first, last, K, W, G,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BITS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum over groups, of columns ``first`` to ``last``; GROUP = 0: all of K is one."""
    BLOCK_M: tl.constexpr = m.shape[0]
    HALVES: tl.constexpr = 8 // BITS
    RUN: tl.constexpr = 32  # as in grouped_packing.py
    SHARES: tl.constexpr = GROUP > 0 and GROUP % BLOCK_K > 0  # groups a step
    LENGTH: tl.constexpr = BLOCK_K if not SHARES else RUN if GROUP % RUN == 0 else RUN // 2
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total_dtype: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    inside = start_n + tl.arange(0, BLOCK_N) < N
    # Of channels 32-bit distances: pointers would be twice the registers.
    here = start_n.to(tl.int64) * G
    rows = (scale_ptr + here, zero_ptr + here, tl.arange(0, BLOCK_N) * G)
    byte = tl.arange(0, BLOCK_K // HALVES)
    k = byte if BITS == 8 else byte // RUN * (2 * RUN) + byte % RUN
    x_row = x_ptr + m.to(tl.int64)[:, None] * K
    w_row = w_ptr + wrapped_range(start_n, N, BLOCK_N).to(tl.int64)[None, :] * W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), total_dtype)
    x_total = tl.zeros((BLOCK_M,), total_dtype)
    for start in range(first, last, BLOCK_K):
        w_byte = start // HALVES + byte
        if EVEN_K:
            packed = tl.load(w_row + w_byte[:, None])
        else:
            packed = tl.load(w_row + w_byte[:, None], mask=(w_byte < W)[:, None], other=0)
        for half in tl.static_range(HALVES):
            of_half = start + half * RUN
            if EVEN_K:
                x = tl.load(x_row + (of_half + k)[None, :])
            else:
                x = tl.load(x_row + (of_half + k)[None, :], mask=(of_half + k < K)[None, :], other=0)
            codes = _codes(packed, half, BITS, ZEROS, dtype)
            if LENGTH >= RUN or BITS == 8:
                total = _product(x, codes, total, PRECISION)
                if ZEROS != "middle":
                    x_total += tl.sum(x.to(total_dtype), 1)
                if SHARES:
                    acc, total, x_total = _ended(
                        (acc, total, x_total), of_half, last, rows, inside, G, GROUP, LENGTH, ZEROS
                    )
            else:
                for part in tl.static_range(2):
                    of_part = tl.where((byte // LENGTH == part)[None, :], x, 0)
                    total = _product(of_part, codes, total, PRECISION)
                    if ZEROS != "middle":
                        x_total += tl.sum(of_part.to(total_dtype), 1)
                    acc, total, x_total = _ended(
                        (acc, total, x_total), of_half + part * LENGTH, last, rows, inside, G,
                        GROUP, LENGTH, ZEROS,
                    )  # fmt: skip
        if GROUP > 0 and not SHARES:
            acc, total, x_total = _ended(
                (acc, total, x_total), start, last, rows, inside, G, GROUP, LENGTH, ZEROS
            )
    if GROUP == 0:
        acc = _scaled(acc, total, x_total, 0, rows, inside, G, ZEROS)
    return acc


@triton.jit
def _store_tile(
    y, start_m, start_n, x_columns_ptr, linear, wanted, M,
    HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What of ``y + x_columns @ w_columns + bias`` is inside the result, 64 columns after one another.

    Args:
        linear: pointers to its columns' weights, bias and result, and N.
    """
    if y.shape[1] > 64:
        left, right = halves(y)
        _store_tile(
            left, start_m, start_n, x_columns_ptr, linear, wanted, M, HAS_BIAS, COLUMNS, ROOM, PRECISION
        )
        _store_tile(
            right, start_m, start_n + left.shape[1], x_columns_ptr, linear, wanted, M,
            HAS_BIAS, COLUMNS, ROOM, PRECISION,
        )  # fmt: skip
    else:
        w_columns_ptr, bias_ptr, y_ptr, N = linear
        m, n = start_m + tl.arange(0, y.shape[0]), start_n + tl.arange(0, y.shape[1])
        if COLUMNS:
            y = add_columns(y, x_columns_ptr, w_columns_ptr, m % M, n, N, COLUMNS, ROOM, PRECISION)
        if HAS_BIAS:
            y += of_columns(bias_ptr, n, N)[None, :]
        target = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :] & wanted
        tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grouped_gemm_kernel(
    x_ptr,  # [SETS, M, K], int8 or a float
    x_scale_ptr,  # [SETS, M] fp32, where x is int8
    x_columns_ptr,  # [SETS, M, ROOM], zero from COLUMNS on, where COLUMNS
    sets_ptr,  # [linears] int32, where SETS: the set of each
    parts_ptr, counters_ptr,  # see split.py, where SPLIT_K > 1
    w0_ptr, w1_ptr, w2_ptr,  # [N, W] bytes
    scale0_ptr, scale1_ptr, scale2_ptr,  # [N, G]
    zero0_ptr, zero1_ptr, zero2_ptr,  # [N, G], zero points or offsets, but for ZEROS = "middle"
    w_columns0_ptr, w_columns1_ptr, w_columns2_ptr,  # [COLUMNS, N], where COLUMNS
    bias0_ptr, bias1_ptr, bias2_ptr,  # [N], where HAS_BIAS
    y0_ptr, y1_ptr, y2_ptr,  # [M, N]
    M, N0, N1, N2, K, W, G,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
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
    N, w_ptr, scale_ptr, zero_ptr = N0, w0_ptr, scale0_ptr, zero0_ptr
    w_columns_ptr, bias_ptr, y_ptr = w_columns0_ptr, bias0_ptr, y0_ptr
    if GROUPED:
        group = (tile_n >= first0).to(tl.int32) + (tile_n >= first1).to(tl.int32)
        tile_n -= pick(group, 0, first0, first1)
        N = pick(group, N0, N1, N2)
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        scale_ptr = pick(group, scale0_ptr, scale1_ptr, scale2_ptr)
        y_ptr = pick(group, y0_ptr, y1_ptr, y2_ptr)
        if ZEROS != "middle":
            zero_ptr = pick(group, zero0_ptr, zero1_ptr, zero2_ptr)
        if COLUMNS:
            w_columns_ptr = pick(group, w_columns0_ptr, w_columns1_ptr, w_columns2_ptr)
        if HAS_BIAS:
            bias_ptr = pick(group, bias0_ptr, bias1_ptr, bias2_ptr)
        if SETS:
            set_rows = tl.load(sets_ptr + group).to(tl.int64) * M
            x_ptr += set_rows * K
            x_scale_ptr += set_rows
            x_columns_ptr += set_rows * ROOM
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    m = wrapped_range(start_m, M, BLOCK_M)
    part, first, last = 0, 0, K
    if SPLIT_K > 1:
        part = tl.program_id(1)
        first, last = part_of_range(K, part, SPLIT_K, BLOCK_K)
    y = _grouped_sums(
        x_ptr, w_ptr, scale_ptr, zero_ptr, m, start_n, N, first, last, K, W, G,
        BLOCK_N, BLOCK_K, GROUP, ZEROS, BITS, EVEN_K, PRECISION,
    )  # fmt: skip
    wanted = True
    if SPLIT_K > 1:
        y, wanted = sum_of_tile(y, part, parts_ptr, counters_ptr, SPLIT_K)
    if x_ptr.dtype.element_ty == tl.int8:
        y *= tl.load(x_scale_ptr + m)[:, None]
    linear = (w_columns_ptr, bias_ptr, y_ptr, N)
    _store_tile(
        y, start_m, start_n, x_columns_ptr, linear, wanted, M, HAS_BIAS, COLUMNS, ROOM, PRECISION
    )
