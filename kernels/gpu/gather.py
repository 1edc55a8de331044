"""Quantise and gather: rows to int8, and the outlier columns of ``x`` and of the weights side by side.

One launch between the kernel that computes ``x`` (and its witness, ``columns.py``) and the product::

    C                       = outlier columns of x, in order
    x_scale[m], x_int8[m]   = row m quantised without the columns in C        (column decomposition)
    x_gathered[m, j]        = x[m, C[j]]
    w_gathered[n, j]        = w_int8[n, C[j]]
    count                   = |C|

The outlier product then runs over contiguous operands that need no mask: both are zero from ``count``
up to the next multiple of ``BLOCK_O``. Their capacity is all of K, so nothing is ever dropped; memory
beyond what is written is not touched. Plain gathering inside the product costs it 60 registers a
thread, and its pipelining.

Source: Dettmers et al. 2022, "LLM.int8()", section 3.2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.columns import compact_columns, outlier_columns_reference
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.rounding import quantize, scale_of_rows
from int8fx.kernels.quantize import quantize_reference

BLOCK_O = 32
_ROWS, _FEW_ROWS = 4, 1024
_WEIGHT_ROWS = 64
_ELEMENTS = 8192  # of x, in one step of a program
_LOOK = 2048  # columns of the witness, in one step


def quantize_gather_reference(
    x: Tensor, weights: list[Tensor], threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The formula above in plain PyTorch; gathered operands are ``[*, count]``, without padding.

    Returns:
        ``x_int8 [M, K]``, ``x_scale [M]``, ``x_gathered [M, count]``, ``w_gathered [ΣN, count]`` of
        x's dtype, and ``count [1]`` int32.
    """
    x_int8, x_scale, _, _ = quantize_reference(x, threshold, "column")
    columns = outlier_columns_reference(x, threshold)
    w_gathered = torch.cat(weights)[:, columns].to(x.dtype)
    count = columns.sum(dtype=torch.int32).reshape(1)
    return x_int8, x_scale, x[:, columns], w_gathered, count


@triton.jit
def quantize_without_columns(
    x_ptr, taken_ptr, x_int8_ptr, x_scale_ptr, rows, M, K, BLOCK_K: tl.constexpr
):
    ROWS: tl.constexpr = rows.shape[0]
    # Rows past the end look at others again. Outlier columns are loaded as well: under their mask a
    # load would be one of two bytes.
    source = (rows % M).to(tl.int64)[:, None] * K
    dtype = x_ptr.dtype.element_ty
    absmax = tl.zeros((ROWS, BLOCK_K), dtype)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + source + k[None, :], mask=(k < K)[None, :], other=0.0)
        taken = tl.load(taken_ptr + k, mask=k < K, other=1) != 0
        # Extremes need no conversion: two of fp16 are one instruction. Of a number and NaN the minimum
        # is the number, so that what is not taken is its own, and a NaN that is taken is zero.
        limit = tl.where(taken, 0.0, float("nan")).to(dtype)
        regular = tl.minimum(tl.abs(x), limit[None, :])
        absmax = tl.maximum(absmax, regular, propagate_nan=tl.PropagateNan.ALL)
    x_scale = scale_of_rows(absmax.to(tl.float32))
    tl.store(x_scale_ptr + rows, x_scale, mask=rows < M)
    target = rows.to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + source + k[None, :], mask=(k < K)[None, :], other=0.0)
        taken = tl.load(taken_ptr + k, mask=k < K, other=1) != 0
        regular = tl.where(taken[None, :], 0.0, x.to(tl.float32))
        x_int8 = quantize(regular, x_scale[:, None], dtype != tl.float32)
        inside = (rows < M)[:, None] & (k < K)[None, :]
        tl.store(x_int8_ptr + target + k[None, :], x_int8, mask=inside)


@triton.jit
def _gather(source_ptr, target_ptr, target_rows, source_rows, inside, columns_ptr, count,
            K, CAPACITY, BLOCK_O: tl.constexpr):  # fmt: skip
    """``target[r, j] = source[r, columns[j]]``, zero from ``count`` to the end of its block."""
    source = source_rows.to(tl.int64)[:, None] * K
    target = target_rows.to(tl.int64)[:, None] * CAPACITY
    for start in range(0, count, BLOCK_O):
        j = start + tl.arange(0, BLOCK_O)
        column = tl.load(columns_ptr + j, mask=j < count, other=0)
        wanted = inside[:, None] & (j < count)[None, :]
        values = tl.load(source_ptr + source + column[None, :], mask=wanted, other=0)
        values = values.to(target_ptr.dtype.element_ty)
        tl.store(target_ptr + target + j[None, :], values, mask=inside[:, None])


@triton.jit
def quantize_gather_kernel(
    x_ptr,  # [M, K]
    witness_ptr,  # [2, K]
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    x_int8_ptr,  # [M, K]
    x_scale_ptr,  # [M]
    x_gathered_ptr,  # [M, CAPACITY]
    w_gathered_ptr,  # [N0 + N1 + N2, CAPACITY]
    taken_ptr, columns_ptr,  # [K] int8 and int32, to work with
    count_ptr,  # [1]
    M, N0, N1, N2, K, CAPACITY,
    threshold,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOOK_BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The first programs take ``ROWS`` rows of x each, the others ``WEIGHT_ROWS`` rows of a weight."""
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    program = tl.program_id(0)
    count = compact_columns(
        witness_ptr, x_ptr, taken_ptr, columns_ptr, M, K, limit, LOOK_BLOCK, LIST_BLOCK
    )
    if program == 0:
        tl.store(count_ptr, count)
    x_programs = tl.cdiv(M, ROWS)
    if program < x_programs:
        rows = program * ROWS + tl.arange(0, ROWS)
        if QUANTIZE:
            quantize_without_columns(x_ptr, taken_ptr, x_int8_ptr, x_scale_ptr, rows, M, K, BLOCK_K)
        _gather(x_ptr, x_gathered_ptr, rows, rows, rows < M, columns_ptr, count,
                K, CAPACITY, BLOCK_O)  # fmt: skip
    else:
        block = program - x_programs
        first0 = tl.cdiv(N0, WEIGHT_ROWS)
        first1 = first0 + tl.cdiv(N1, WEIGHT_ROWS)
        group = (block >= first0).to(tl.int32) + (block >= first1).to(tl.int32)
        block -= pick(group, 0, first0, first1)
        n = block * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
        inside = n < pick(group, N0, N1, N2)
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        target_rows = n + pick(group, 0, N0, N0 + N1)
        _gather(w_ptr, w_gathered_ptr, target_rows, n, inside, columns_ptr, count,
                K, CAPACITY, BLOCK_O)  # fmt: skip


def launch_shape(M: int, K: int, quantizes: bool) -> dict[str, int]:
    """The kernel's block sizes for M rows of K elements.

    Every program lists the outlier columns for itself, so that many rows want few programs, and few
    rows many. Only M's class is looked at, as in ``configs.gemm_configs``. Narrow blocks take fewer
    warps: with 48 registers a thread, as eight warps leave at K = 512, ptxas spills around the slow
    path of the division on sm_90.
    """
    rows = _ROWS if M <= _FEW_ROWS else 2 * _ROWS
    look = max(32, min(_LOOK, triton.next_power_of_2(K)))
    return {
        "ROWS": rows if quantizes else 4 * rows,
        "WEIGHT_ROWS": _WEIGHT_ROWS,
        "BLOCK_K": min(look, _ELEMENTS // rows),
        "LOOK_BLOCK": look,
        "LIST_BLOCK": min(256, max(16, look // 8)),
        "BLOCK_O": BLOCK_O,
        "num_warps": 4 if look <= 512 else 8,
    }
