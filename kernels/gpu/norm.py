"""A norm whose result is never written: its statistics, its outliers, and its int8.

    h = normalized(x), x the sum of two tensors or one               RMSNorm or LayerNorm, ``NORMS``
    candidate_rows[k]     = a row with |h| >= threshold in column k  (``columns.py``)
    x_scale[m], x_int8[m] = row m of h quantised without its outliers        (token decomposition)

Whoever reads h afterwards, for its outlier columns, or to quantise it without them, reads x and
computes it again from ``statistics``: 2 bytes an element less to write, and none more to read. It is
the same h, bit for bit, which ``normalized`` sees to: what is no outlier here and one there would be
lost, or counted twice.

Inductor writes such a kernel as well, where this one does not serve (``serves``). Of RMSNorm in fp16 it
takes twice the instructions and more: it has no masked scatter for the candidate rows, 16 warps for a
row, and blocks that end at powers of two. A row here is in chunks, as many as it takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.rounding import MIN_SCALE, reciprocal_int8
from int8fx.kernels.gpu.rows import (
    ROW_BYTES,
    appended,
    chunk_of_columns,
    chunks_of_row,
    load_columns,
    store_columns,
)

# Of x and a weight (and a bias); the weight is applied in fp32, or after rounding, as Llama's is.
NORMS = ("rms", "rms, rounded", "layer", "layer, bias")
_ROW_BYTES = ROW_BYTES * 7 // 8  # in eight chunks of 2048, what a norm takes beside them would spill


def serves(x: Tensor) -> bool:
    """Whether rows as long as those of ``x [*, K]`` stay in registers, here and in ``gather.py``."""
    return x.shape[-1] * x.dtype.itemsize <= _ROW_BYTES


def norm_statistics(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd`` of each row of ``x [M, K]``, both ``[M, 1]`` fp32; in plain PyTorch."""
    x32 = x.to(torch.float32)
    mean = x32.mean(-1, keepdim=True) if norm.startswith("layer") else torch.zeros_like(x32[:, :1])
    centered = x32 - mean if norm.startswith("layer") else x32
    return mean, torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)


def normalized_reference(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, norm: str
) -> Tensor:
    """``normalized`` in plain PyTorch: ``h [M, K]``, of the dtype that the model gives it."""
    h = x.to(torch.float32)
    h = (h - mean if norm.startswith("layer") else h) * rstd
    if norm == "rms, rounded":
        return weight * h.to(weight.dtype)
    h = h * weight
    return (h if bias is None else h + bias).to(x.dtype)


@triton.jit
def normalized(x, mean, rstd, weight, bias, NORM: tl.constexpr):
    """``h`` of ``x``; everything else is broadcast to its shape.

    One multiplication after another, and a fused addition: nothing for a compiler to contract in one
    kernel and not in the other.
    """
    if NORM == "rms, rounded":
        return (x.to(tl.float32) * rstd).to(weight.dtype) * weight
    else:
        h = x.to(tl.float32)
        if NORM == "layer" or NORM == "layer, bias":
            h -= mean
        h *= rstd
        if NORM == "layer, bias":
            h = tl.fma(h, weight.to(tl.float32), bias.to(tl.float32))
        else:
            h *= weight.to(tl.float32)
        return h.to(x.dtype)


@triton.jit
def normalized_at(x, row, has_row, k, has_k, M, norm, NORM: tl.constexpr):
    """``normalized`` of what was read at rows ``row`` and columns ``k``, or x itself.

    Args:
        has_row, has_k: masks of row and of k.
        norm: pointers to statistics ``[2, M]``, weight and bias.
        NORM: one of NORMS, or "" for none.
    """
    if NORM == "":
        return x
    else:
        statistics_ptr, weight_ptr, bias_ptr = norm
        rstd = tl.load(statistics_ptr + row, mask=has_row, other=0.0)
        weight = tl.load(weight_ptr + k, mask=has_k, other=0.0)
        mean, bias = rstd, weight  # not read where the norm has none
        if NORM == "layer" or NORM == "layer, bias":
            mean = tl.load(statistics_ptr + M + row, mask=has_row, other=0.0)
        if NORM == "layer, bias":
            bias = tl.load(bias_ptr + k, mask=has_k, other=0.0)
        return normalized(x, mean, rstd, weight, bias, NORM)


@triton.jit
def load_row(
    x_ptr, addend_ptr, sum_ptr, here, K,
    ADDS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The chunks of a row, or of a sum, which is stored as well."""
    row = ()
    for index in tl.static_range(CHUNKS):
        k = chunk_of_columns(index, CHUNK)
        x = load_columns(x_ptr + here, k, K, EVEN_K)
        if ADDS:
            addend = load_columns(addend_ptr + here, k, K, EVEN_K)
            x = (x.to(tl.float32) + addend.to(tl.float32)).to(x.dtype)
            store_columns(sum_ptr + here, k, x, K, EVEN_K)
        row = appended(row, x)
    return row


@triton.jit
def statistics_of_row(
    row, K, eps,
    NORM: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``mean`` and ``rstd`` of a row; a mean of 0 where the norm has none."""
    mean = 0.0
    if NORM == "layer" or NORM == "layer, bias":
        total = tl.zeros((CHUNK // 8, 8), tl.float32)
        for index in tl.static_range(CHUNKS):
            total += row[index].to(tl.float32)
        mean = tl.sum(tl.sum(total, 1), 0) / K
    squares = tl.zeros((CHUNK // 8, 8), tl.float32)
    for index in tl.static_range(CHUNKS):
        centered = row[index].to(tl.float32) - mean
        if not EVEN_K:
            centered = tl.where(chunk_of_columns(index, CHUNK) < K, centered, 0.0)
        squares += centered * centered
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    mean_square = tl.sum(tl.sum(squares, 1), 0) / K
    return mean, tl.rsqrt(mean_square + tl.full((), eps, tl.float32))


@triton.jit
def norm_kernel(
    x_ptr,  # [M, K]
    addend_ptr,  # [M, K], where ADDS
    sum_ptr,  # [M, K], where ADDS: x + addend
    weight_ptr,  # [K]
    bias_ptr,  # [K], where the norm has one
    statistics_ptr,  # [2, M] fp32: rstd; and mean, where the norm has one
    candidates_ptr,  # [K]
    x_int8_ptr,  # [M, K], where QUANTIZE
    x_scale_ptr,  # [M] fp32, where QUANTIZE
    M, K,
    eps, threshold,
    NORM: tl.constexpr,
    ADDS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """A row for each program, in chunks that all stay in registers."""
    m = tl.program_id(0)
    here = m.to(tl.int64) * K
    row = load_row(x_ptr, addend_ptr, sum_ptr, here, K, ADDS, CHUNK, CHUNKS, EVEN_K)
    mean, rstd = statistics_of_row(row, K, eps, NORM, CHUNK, CHUNKS, EVEN_K)
    tl.store(statistics_ptr + m, rstd)
    if NORM == "layer" or NORM == "layer, bias":
        tl.store(statistics_ptr + M + m, mean)
    regular = ()
    bits = tl.zeros((CHUNK // 8, 8), tl.int32)
    for index in tl.static_range(CHUNKS):
        k = chunk_of_columns(index, CHUNK)
        weight = load_columns(weight_ptr, k, K, EVEN_K)
        bias = weight
        if NORM == "layer, bias":
            bias = load_columns(bias_ptr, k, K, EVEN_K)
        # Past the end of a row weight and bias are zero, and so is h.
        h = normalized(row[index], mean, rstd, weight, bias, NORM)
        h32 = h.to(tl.float32)
        is_outlier = tl.abs(h32) >= tl.full((), threshold, tl.float32)
        tl.store(candidates_ptr + k, m.to(candidates_ptr.dtype.element_ty), mask=is_outlier)
        if QUANTIZE:
            h32 = tl.where(is_outlier, 0.0, h32)
            # As integers NaN is larger than all others.
            bits = tl.maximum(bits, tl.abs(h32).to(tl.int32, bitcast=True))
            regular = appended(regular, h32.to(h.dtype))
    if QUANTIZE:
        absmax = tl.max(tl.max(bits, 1), 0).to(tl.float32, bitcast=True)
        x_scale = tl.maximum(tl.div_rn(absmax, 127.0), MIN_SCALE, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x_scale_ptr + m, x_scale)
        for index in tl.static_range(CHUNKS):
            x_int8 = reciprocal_int8(regular[index].to(tl.float32), x_scale)
            store_columns(x_int8_ptr + here, chunk_of_columns(index, CHUNK), x_int8, K, EVEN_K)


def norm_shape(x: Tensor) -> dict[str, int | bool]:
    """The kernel's chunks, and warps: 8 elements a lane of each chunk, 32 or more of a long row."""
    K = x.shape[-1]
    warps = min(8, max(1, triton.next_power_of_2(K + 1) // 2048))
    return chunks_of_row(K, 256 * warps) | {"num_warps": warps}
