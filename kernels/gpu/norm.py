"""A norm whose result is never written: its statistics, its outliers, and its int8.

    h = normalized(x), x the sum of two tensors or one               RMSNorm or LayerNorm, ``NORMS``
    witness[k]            = a row with |h| >= threshold in column k  (``columns.py``)
    x_scale[m], x_int8[m] = row m of h quantised without its outliers        (token decomposition)

Whoever reads h afterwards, for its outlier columns, or to quantise it without them, reads x and
computes it again from ``statistics``: 2 bytes an element less to write, and none more to read. It is
the same h, bit for bit, which ``normalized`` sees to: what is no outlier here and one there would be
lost, or counted twice.

Inductor writes such a kernel as well, where this one does not serve (``serves``). Of RMSNorm in fp16 it
takes twice the instructions: it has no masked scatter for the witness, and 16 warps for a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.rounding import MIN_SCALE, reciprocal_int8

# Of x and a weight (and a bias); the weight is applied in fp32, or after rounding, as Llama's is.
NORMS = ("rms", "rms, rounded", "layer", "layer, bias")
_ROW_BYTES = 32768  # of x, of the longest row that a program keeps in registers


def serves(x: Tensor, decomposition: str, norm: str) -> bool:
    """Whether rows as long as those of ``x [*, K]`` stay in registers, here and where they are gathered
    from or, in the column decomposition, quantised, two or four of them."""
    is_light = decomposition == "token" and norm.startswith("rms")
    most = _ROW_BYTES if is_light else _ROW_BYTES // 2
    return triton.next_power_of_2(x.shape[-1]) * x.dtype.itemsize <= most


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
def neighbours(BLOCK_K: tl.constexpr):
    """The first BLOCK_K columns, ``[BLOCK_K / 8, 8]``: eight neighbours for a thread, of 16-bit as of
    int8. Else Triton would deal out 16 of int8, and values change threads on the way."""
    return 8 * tl.arange(0, BLOCK_K // 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def norm_kernel(
    x_ptr,  # [M, K]
    addend_ptr,  # [M, K], where ADDS
    sum_ptr,  # [M, K], where ADDS: x + addend
    weight_ptr,  # [K]
    bias_ptr,  # [K], where the norm has one
    statistics_ptr,  # [2, M] fp32: rstd; and mean, where the norm has one
    witness_ptr,  # [K]
    x_int8_ptr,  # [M, K], where QUANTIZE
    x_scale_ptr,  # [M] fp32, where QUANTIZE
    M, K,
    eps, threshold,
    NORM: tl.constexpr,
    ADDS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row for each program."""
    m = tl.program_id(0)
    here = m.to(tl.int64) * K
    k = neighbours(BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + here + k, mask=inside, other=0.0)
    if ADDS:
        addend = tl.load(addend_ptr + here + k, mask=inside, other=0.0)
        x = (x.to(tl.float32) + addend.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + here + k, x, mask=inside)
    centered = x.to(tl.float32)
    mean = 0.0
    if NORM == "layer" or NORM == "layer, bias":
        mean = _sum(centered) / K
        centered = tl.where(inside, centered - mean, 0.0)
        tl.store(statistics_ptr + M + m, mean)
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    rstd = tl.rsqrt(_sum(centered * centered) / K + tl.full((), eps, tl.float32))
    tl.store(statistics_ptr + m, rstd)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0)
    bias = weight
    if NORM == "layer, bias":
        bias = tl.load(bias_ptr + k, mask=inside, other=0.0)
    # Past the end of a row weight and bias are zero, and so is h.
    h = normalized(x, mean, rstd, weight, bias, NORM).to(tl.float32)
    is_outlier = tl.abs(h) >= tl.full((), threshold, tl.float32)
    tl.store(witness_ptr + k, m.to(witness_ptr.dtype.element_ty), mask=is_outlier)
    if QUANTIZE:
        regular = tl.where(is_outlier, 0.0, h)
        # As integers NaN is larger than all others.
        bits = tl.abs(regular).to(tl.int32, bitcast=True)
        absmax = tl.max(tl.max(bits, 1), 0).to(tl.float32, bitcast=True)
        x_scale = tl.maximum(tl.div_rn(absmax, 127.0), MIN_SCALE, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x_scale_ptr + m, x_scale)
        tl.store(x_int8_ptr + here + k, reciprocal_int8(regular, x_scale), mask=inside)


def norm_shape(x: Tensor) -> dict[str, int]:
    """The kernel's block, and warps that have 32 elements a lane of it."""
    block = max(32, triton.next_power_of_2(x.shape[-1]))
    return {"BLOCK_K": block, "num_warps": min(16, max(1, block // 1024))}
