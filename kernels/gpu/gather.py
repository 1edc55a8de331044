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

from int8fx.kernels.gpu.columns import (
    compact_columns,
    is_outlier_column,
    outlier_columns_reference,
)
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.rounding import quantize, scale_of_rows
from int8fx.kernels.quantize import quantize_reference

BLOCK_O = 32
_ROWS = 4
_WEIGHT_ROWS = 16
_MAX_BLOCK_K = 2048


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
def quantize_rows(
    x_ptr, witness_ptr, x_int8_ptr, x_scale_ptr, rows, M, K, threshold, BLOCK_K: tl.constexpr
):
    ROWS: tl.constexpr = rows.shape[0]
    offset = rows.to(tl.int64)[:, None] * K
    absmax = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        taken = is_outlier_column(witness_ptr, x_ptr, k, M, K, threshold)
        inside = (rows < M)[:, None] & ((k < K) & (taken == 0))[None, :]
        x = tl.load(x_ptr + offset + k[None, :], mask=inside, other=0.0).to(tl.float32)
        absmax = tl.maximum(absmax, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    x_scale = scale_of_rows(absmax)
    tl.store(x_scale_ptr + rows, x_scale, mask=rows < M)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        taken = is_outlier_column(witness_ptr, x_ptr, k, M, K, threshold)
        inside = (rows < M)[:, None] & (k < K)[None, :]
        regular = inside & (taken == 0)[None, :]
        x = tl.load(x_ptr + offset + k[None, :], mask=regular, other=0.0).to(tl.float32)
        x_int8 = quantize(x, x_scale[:, None], x_ptr.dtype.element_ty != tl.float32)
        tl.store(x_int8_ptr + offset + k[None, :], x_int8, mask=inside)


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
    columns_ptr,  # [K]
    count_ptr,  # [1]
    M, N0, N1, N2, K, CAPACITY,
    threshold,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The first programs take ``ROWS`` rows of x each, the others ``WEIGHT_ROWS`` rows of a weight."""
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    program = tl.program_id(0)
    count = compact_columns(witness_ptr, x_ptr, columns_ptr, M, K, limit, BLOCK_K)
    if program == 0:
        tl.store(count_ptr, count)
    x_programs = tl.cdiv(M, ROWS)
    if program < x_programs:
        rows = program * ROWS + tl.arange(0, ROWS)
        if QUANTIZE:
            quantize_rows(x_ptr, witness_ptr, x_int8_ptr, x_scale_ptr, rows, M, K, limit, BLOCK_K)
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


def launch_shape(K: int) -> dict[str, int]:
    """The kernel's block sizes for rows of K elements.

    Narrow blocks take fewer warps: with 48 registers a thread, as eight warps leave at K = 512, ptxas
    spills around the slow path of the division on sm_90.
    """
    block_k = min(_MAX_BLOCK_K, triton.next_power_of_2(K))
    return {
        "ROWS": _ROWS,
        "WEIGHT_ROWS": _WEIGHT_ROWS,
        "BLOCK_K": max(32, block_k),
        "BLOCK_O": BLOCK_O,
        "num_warps": 4 if block_k <= 512 else 8,
    }
