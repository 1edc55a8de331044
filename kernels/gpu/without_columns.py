"""Rows to int8 without the outlier columns, given their candidate rows (``columns.py``)::

    x_scale[m], x_int8[m] = row m quantised without the columns in C        (column decomposition)

Which columns these are takes more instructions than a row does: a program asks once, for several steps
of rows, and keeps the answer in registers, as it keeps the rows between their absmax and their int8.
Reference: ``kernels/ops/quantize_reference.py``.
"""

import triton
import triton.language as tl

from int8fx.kernels.gpu.columns import are_outliers, load_candidates
from int8fx.kernels.gpu.norm import normalized_at
from int8fx.kernels.gpu.rounding import folded, quantize, scale_of_rows
from int8fx.kernels.gpu.rows import appended, chunk_of_columns, load_columns


@triton.jit
def quantize_without_columns(
    x_ptr, candidates_ptr, x_int8_ptr, x_scale_ptr, first, M, K, threshold,
    ROWS: tl.constexpr, STEPS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr,
    SHORT: tl.constexpr, norm, NORM: tl.constexpr,
):  # fmt: skip
    """Writes ``x_int8`` and ``x_scale`` of STEPS times ROWS rows from ``first``. The CHUNKS of a row
    stay in registers between, and so does what is known of their columns; 0: it is too long."""
    if CHUNKS > 0:
        bounds = _bounds_of_row(
            x_ptr, candidates_ptr, M, K, threshold, CHUNK, CHUNKS, SHORT, norm, NORM
        )
        for step in range(STEPS):
            rows = first + step * ROWS + tl.arange(0, ROWS)
            _quantize_rows(
                x_ptr, x_int8_ptr, x_scale_ptr, rows, bounds, M, K, CHUNK, CHUNKS, EVEN_K, norm, NORM
            )
    else:
        tl.static_assert(STEPS == 1 and NORM == "")
        rows = first + tl.arange(0, ROWS)
        absmax = _absmax_of_chunk(x_ptr, candidates_ptr, rows, 0, M, K, threshold, CHUNK, EVEN_K)
        for index in range(1, tl.cdiv(K, CHUNK)):
            more = _absmax_of_chunk(x_ptr, candidates_ptr, rows, index, M, K, threshold, CHUNK, EVEN_K)
            absmax = tl.maximum(absmax, more, propagate_nan=tl.PropagateNan.ALL)
        x_scale = _scale(x_scale_ptr, rows, absmax.to(tl.float32), M)
        for index in range(0, tl.cdiv(K, CHUNK)):
            x = _regular_chunk(x_ptr, candidates_ptr, rows, index, M, K, threshold, CHUNK, EVEN_K)
            _store_int8(x_int8_ptr, rows, chunk_of_columns(index, CHUNK), x, x_scale, M, K)


@triton.jit
def _bounds_of_row(
    x_ptr, candidates_ptr, M, K, threshold, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SHORT: tl.constexpr, norm, NORM: tl.constexpr,
):  # fmt: skip
    bounds = ()
    for index in tl.static_range(CHUNKS):
        k = chunk_of_columns(index, CHUNK)
        candidates = load_candidates(candidates_ptr, k, M, K, SHORT)
        bounds = appended(bounds, _bound(x_ptr, candidates, k, M, K, threshold, norm, NORM))
    return bounds


@triton.jit
def _bound(x_ptr, candidates, k, M, K, threshold, norm, NORM: tl.constexpr):
    """0 for the columns ``k`` that hold an outlier, and NaN for the others; see ``_regular``."""
    row, is_row, offset = candidates
    x = tl.load(x_ptr + offset, mask=is_row, other=0.0)
    taken = are_outliers(x, row, is_row, k, M, K, threshold, norm, NORM)
    bound = tl.where(taken, 0.0, float("nan"))
    if NORM == "rms, rounded":
        return bound.to(norm[1].dtype.element_ty)
    else:
        return bound.to(x_ptr.dtype.element_ty)


@triton.jit
def _quantize_rows(
    x_ptr, x_int8_ptr, x_scale_ptr, rows, bounds, M, K,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr, norm, NORM: tl.constexpr,
):  # fmt: skip
    row = (rows % M).to(tl.int64)[:, None, None]  # those past the end look at others again
    regular = ()
    for index in tl.static_range(CHUNKS):
        k = chunk_of_columns(index, CHUNK)
        x = load_columns(x_ptr + row * K, k[None, :, :], K, EVEN_K)
        x = _regular(x, row, k, bounds[index], M, K, EVEN_K, norm, NORM)
        if index == 0:
            absmax = _absmax(x)
        else:
            absmax = tl.maximum(absmax, _absmax(x), propagate_nan=tl.PropagateNan.ALL)
        regular = appended(regular, x)
    x_scale = _scale(x_scale_ptr, rows, absmax.to(tl.float32), M)
    for index in tl.static_range(CHUNKS):
        _store_int8(x_int8_ptr, rows, chunk_of_columns(index, CHUNK), regular[index], x_scale, M, K)


@triton.jit
def _regular(x, row, k, bound, M, K, EVEN_K: tl.constexpr, norm, NORM: tl.constexpr):
    """``x [rows, k]``, zero in outlier columns, whatever they hold: NaN and infinity as well.

    As ``k`` has two dimensions, this has three. Outlier columns are loaded too: under their mask a load
    would be one of two bytes.
    """
    column = k[None, :, :]
    x = normalized_at(x, row, True, column, True if EVEN_K else column < K, M, norm, NORM)
    # Of a number and NaN minimum and maximum are the number. Two of fp16 are one instruction, where
    # tl.where takes them apart.
    return tl.maximum(tl.minimum(x, bound[None, :, :]), bound[None, :, :])


@triton.jit
def _regular_chunk(
    x_ptr, candidates_ptr, rows, index, M, K, threshold, CHUNK: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """``_regular`` of a row that is too long to stay in registers."""
    k = chunk_of_columns(index, CHUNK)
    candidates = load_candidates(candidates_ptr, k, M, K, False)
    bound = _bound(x_ptr, candidates, k, M, K, threshold, None, "")
    row = (rows % M).to(tl.int64)[:, None, None]
    x = load_columns(x_ptr + row * K, k[None, :, :], K, EVEN_K)
    return _regular(x, row, k, bound, M, K, EVEN_K, None, "")


@triton.jit
def _absmax_of_chunk(
    x_ptr, candidates_ptr, rows, index, M, K, threshold, CHUNK: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    return _absmax(_regular_chunk(x_ptr, candidates_ptr, rows, index, M, K, threshold, CHUNK, EVEN_K))


@triton.jit
def _absmax(x):
    """Partial maxima of rows. They need no conversion: two of fp16 are one instruction."""
    rows = tl.reshape(tl.abs(x), (x.shape[0], x.shape[1] * x.shape[2]))
    return folded(rows, x.shape[2])


@triton.jit
def _scale(x_scale_ptr, rows, absmax, M):
    x_scale = scale_of_rows(absmax)
    tl.store(x_scale_ptr + rows, x_scale, mask=rows < M)
    return x_scale


@triton.jit
def _store_int8(x_int8_ptr, rows, k, x, x_scale, M, K):
    x_int8 = quantize(x.to(tl.float32), x_scale[:, None, None], x.dtype != tl.float32)
    target = x_int8_ptr + rows.to(tl.int64)[:, None, None] * K + k[None, :, :]
    tl.store(target, x_int8, mask=(rows < M)[:, None, None] & (k < K)[None, :, :])
