"""What all tiles of the product have in common (``gemm.py``, ``mixed_tiles.py``)."""

import triton
import triton.language as tl

from int8fx.kernels.gpu.split import halves

# Outlier columns a step: of those that were gathered, and of others.
BLOCK_O = tl.constexpr(32)
STEP_O = tl.constexpr(16)


@triton.jit
def wrapped_range(start, limit, BLOCK: tl.constexpr):
    """BLOCK numbers from ``start``. Past the limit they are others: loads without masks pipeline.

    They are for rows of operands. They are not contiguous where BLOCK does not divide the limit: a
    vector of elements at such numbers would be misaligned (``of_columns``).
    """
    return (start + tl.arange(0, BLOCK)) % limit


@triton.jit
def of_columns(pointer, columns, N):
    """The scales or biases of some columns in fp32, and 0 past the end.

    Under a mask, since a remainder has no alignment: where 16 divides N, Triton loads vectors.
    """
    return tl.load(pointer + columns, mask=columns < N, other=0.0).to(tl.float32)


@triton.jit
def scaled_rows(acc_int32, x_scale_ptr, m):
    """``acc_int32 · x_scale[m]``"""
    return acc_int32.to(tl.float32) * tl.load(x_scale_ptr + m)[:, None]


@triton.jit
def store_tile(
    y, start_m, start_n, linear, wanted, M, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """What of ``y · w_scale + bias`` is inside the result, WIDTH columns after one another: of each, a
    thread keeps the scale and the bias in registers.

    Args:
        linear: pointers to its weight, scales, bias and result, and N.
    """
    if y.shape[1] > WIDTH:
        left, right = halves(y)
        middle = start_n + left.shape[1]
        store_tile(left, start_m, start_n, linear, wanted, M, HAS_BIAS, WIDTH)
        store_tile(right, start_m, middle, linear, wanted, M, HAS_BIAS, WIDTH)
    else:
        _, w_scale_ptr, bias_ptr, y_ptr, N = linear
        rows, columns = start_m + tl.arange(0, y.shape[0]), start_n + tl.arange(0, y.shape[1])
        y *= of_columns(w_scale_ptr, columns, N)[None, :]
        if HAS_BIAS:
            y += of_columns(bias_ptr, columns, N)[None, :]
        target = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        inside = (rows < M)[:, None] & (columns < N)[None, :] & wanted
        tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)
