"""A tall tile of the product: 192 x 256 on Hopper, in two accumulators that share each load of w.

What holds up tiles of 128 x 256 is L2: of operands, a tile reads ``1 / height + 1 / width`` bytes for
each product. 256 x 256 would take all registers for its accumulator. Triton has no tile of 192 rows,
but one of 128 and one of 64, whose 192 registers of a thread leave 63 for everything else:

- places in operands are 32-bit distances from a tile's first element, not pointers;
- a tall tile is whole (``configs.tall_tiles``), so that none of its rows is out of bounds;
- the outliers' loop is not pipelined: loads ahead of it would take registers beside both accumulators;
- the larger accumulator is stored in pieces (``tiles.store_tile``).

The two products do not overlap: Triton leaves no WGMMA with an int32 accumulator in flight, but waits
for each before whatever is next, here as in a short tile.
"""

import triton
import triton.language as tl

from int8fx.kernels.gpu.tiles import scaled_rows, store_tile

_PIECE = tl.constexpr(64)


@triton.jit
def tall_tile(
    start_m, start_n, x_int8_ptr, x_scale_ptr, x_gathered_ptr, w_gathered_ptr, count_ptr,
    w_ptr, w_scale_ptr, bias_ptr, y_ptr, w_offset, M, N, K, CAPACITY,
    BLOCK_M: tl.constexpr, EXTRA_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUTLIERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M + EXTRA_M rows, all of them inside, and BLOCK_N columns of one linear."""
    m, extra = tl.arange(0, BLOCK_M), BLOCK_M + tl.arange(0, EXTRA_M)
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - start_n)
    row, column = start_m.to(tl.int64), start_n.to(tl.int64)
    acc_int32, extra_int32 = _tall_int8_products(
        x_int8_ptr + row * K, w_ptr + column * K, m, extra, n, K, BLOCK_K, EVEN_K
    )
    y = scaled_rows(acc_int32, x_scale_ptr + start_m, m)
    y_extra = scaled_rows(extra_int32, x_scale_ptr + start_m, extra)
    if HAS_OUTLIERS:
        w_gathered_ptr += (w_offset + column) * CAPACITY
        y, y_extra = _add_tall_outliers(
            y, y_extra, x_gathered_ptr + row * CAPACITY, w_gathered_ptr, m, extra, n,
            tl.load(count_ptr), CAPACITY, BLOCK_O, PRECISION,
        )  # fmt: skip
    below = start_m + BLOCK_M
    store_tile(y, start_m, start_n, w_scale_ptr, bias_ptr, y_ptr, True, M, N, HAS_BIAS, _PIECE)
    store_tile(y_extra, below, start_n, w_scale_ptr, bias_ptr, y_ptr, True, M, N, HAS_BIAS, BLOCK_N)


@triton.jit
def _tall_int8_products(x_ptr, w_ptr, m, extra, n, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
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
def _add_tall_outliers(
    acc, acc_extra, x_ptr, w_ptr, m, extra, n, count, CAPACITY,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + x_gathered[m] @ w_gathered[n]ᵀ``, and the same for ``extra``."""
    j = tl.arange(0, BLOCK_O)
    x_tile, extra_tile = m[:, None] * CAPACITY + j[None, :], extra[:, None] * CAPACITY + j[None, :]
    w_tile = n[None, :] * CAPACITY + j[:, None]
    for _ in tl.range(0, count, BLOCK_O, num_stages=1):
        w = tl.load(w_ptr + w_tile)
        acc = tl.dot(tl.load(x_ptr + x_tile), w, acc, input_precision=PRECISION)
        acc_extra = tl.dot(tl.load(x_ptr + extra_tile), w, acc_extra, input_precision=PRECISION)
        x_ptr += BLOCK_O
        w_ptr += BLOCK_O
    return acc, acc_extra
