"""Tiles of two heights in one product: the extended ones, of BLOCK_M + EXTRA_M rows.

On Hopper that is 192 x 256, in two accumulators that share each load of w.

What holds up tiles of 128 x 256 is L2: of operands, a tile reads ``1 / height + 1 / width`` bytes for
each product. 256 x 256 would take all registers for its accumulator. Triton has no tile of 192 rows,
but one of 128 and one of 64, whose 192 registers of a thread leave 63 for everything else:

- places in operands are 32-bit distances from a tile's first element, not pointers;
- an extended tile is whole (``configs.extended_tiles``), so that none of its rows is out of bounds;
- the outliers' loop is not pipelined: loads ahead of it would take registers beside both accumulators;
- the larger accumulator is stored in pieces (``tiles.store_tile``).

The two products do not overlap: Triton leaves no WGMMA with an int32 accumulator in flight, but waits
for each before whatever is next, here as in a plain tile. It does so as well where operands are loaded
by TMA descriptors, in persistent programs, and with ``warp_specialize`` (Triton 3.9). Two blocks of
128 x 128 on a processor fill each other's waits, but read operands more often: the table has both.
"""

import triton
import triton.language as tl

from int8fx.kernels.gpu.tiles import BLOCK_O, STEP_O, scaled_rows, store_tile

_PIECE = tl.constexpr(64)


@triton.jit
def extended_tile(
    start_m, start_n, rows, outliers, linear, M, K,
    BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUTLIERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M + EXTRA_M rows, all of them inside, and BLOCK_N columns of one linear."""
    x_int8_ptr, x_scale_ptr = rows
    w_ptr, _, _, _, N = linear
    m, extra = tl.arange(0, BLOCK_M), BLOCK_M + tl.arange(0, EXTRA_M)
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - start_n)
    row, column = start_m.to(tl.int64), start_n.to(tl.int64)
    w_ptr += column * K
    acc_int32, extra_int32 = _extended_int8_products(
        x_int8_ptr + row * K, w_ptr, m, extra, n, K, BLOCK_K, EVEN_K
    )
    y = scaled_rows(acc_int32, x_scale_ptr + start_m, m)
    y_extra = scaled_rows(extra_int32, x_scale_ptr + start_m, extra)
    if HAS_OUTLIERS:
        y, y_extra = _add_extended_outliers(
            y, y_extra, outliers, w_ptr, row, column, m, extra, n, K, PRECISION
        )
    below = start_m + BLOCK_M
    store_tile(y, start_m, start_n, linear, True, M, HAS_BIAS, _PIECE)
    store_tile(y_extra, below, start_n, linear, True, M, HAS_BIAS, BLOCK_N)


@triton.jit
def _extended_int8_products(x_ptr, w_ptr, m, extra, n, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """``x_int8[m] @ w_int8[n]ᵀ`` and ``x_int8[extra] @ w_int8[n]ᵀ`` in int32."""
    k = tl.arange(0, BLOCK_K)
    x_tile, extra_tile = m[:, None] * K + k[None, :], extra[:, None] * K + k[None, :]
    w_tile = n[None, :] * K + k[:, None]
    acc_int32 = tl.zeros((m.shape[0], n.shape[0]), tl.int32)
    extra_int32 = tl.zeros((extra.shape[0], n.shape[0]), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, x_extra = tl.load(x_ptr + x_tile), tl.load(x_ptr + extra_tile)
            w = tl.load(w_ptr + w_tile)
        else:
            inside = start + k < K
            x = tl.load(x_ptr + x_tile, mask=inside[None, :], other=0)
            x_extra = tl.load(x_ptr + extra_tile, mask=inside[None, :], other=0)
            w = tl.load(w_ptr + w_tile, mask=inside[:, None], other=0)
        acc_int32 = tl.dot(x, w, acc_int32, out_dtype=tl.int32)
        extra_int32 = tl.dot(x_extra, w, extra_int32, out_dtype=tl.int32)
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    return acc_int32, extra_int32


@triton.jit
def _add_extended_outliers(
    acc, acc_extra, outliers, w_ptr, row, column, m, extra, n, K, PRECISION: tl.constexpr
):  # fmt: skip
    """``acc + x_gathered[m] @ w_gathered[n]ᵀ``, and the same for ``extra``; see ``gemm.py``."""
    x_ptr, w_gathered_ptr, columns_ptr, count_ptr, X_CAPACITY, W_CAPACITY = outliers
    count = tl.load(count_ptr)
    gathered = tl.minimum(count, W_CAPACITY)
    x_ptr += row * X_CAPACITY
    x_row, extra_row = m[:, None] * X_CAPACITY, extra[:, None] * X_CAPACITY
    j = tl.arange(0, BLOCK_O)
    w_tile = n[None, :] * W_CAPACITY + j[:, None]
    w_gathered_ptr += column * W_CAPACITY
    for start in tl.range(0, gathered, BLOCK_O, num_stages=1):
        w = tl.load(w_gathered_ptr + start + w_tile)
        x_tile = x_ptr + start + j[None, :]
        acc = tl.dot(tl.load(x_tile + x_row), w, acc, input_precision=PRECISION)
        acc_extra = tl.dot(tl.load(x_tile + extra_row), w, acc_extra, input_precision=PRECISION)
    listed = tl.arange(0, STEP_O)
    for start in tl.range(gathered, count, STEP_O, num_stages=1):
        k = tl.load(columns_ptr + start + listed, mask=start + listed < count, other=0)
        w = tl.load(w_ptr + (n[None, :] * K + k[:, None])).to(x_ptr.dtype.element_ty)
        x_others = x_ptr + start + listed[None, :]
        acc = tl.dot(tl.load(x_others + x_row), w, acc, input_precision=PRECISION)
        acc_extra = tl.dot(tl.load(x_others + extra_row), w, acc_extra, input_precision=PRECISION)
    return acc, acc_extra
