"""Outlier columns: which columns of ``x [M, K]`` hold an element with ``|x| >= threshold``.

The answer needs every row, and the quantisation of every row needs the answer, so it has to cross
from one launch to the next. It crosses as **candidate rows** ``[2, K]``: ``candidate_rows[0, k]`` is a
row that has an outlier in column ``k``, if the column has one. The kernel that computes ``x`` writes
them, at no extra launch::

    for every element:  candidate_rows[outlier ? 0 : 1, k] = m

A kernel that reads a candidate row checks the element of ``x`` in it. So the memory need not be
cleared: what was left there is no row, or a row without an outlier in this column, or one with one.
This takes no fill, no atomic, and no reduction over rows. Row 1 is never read: Inductor has no masked
scatter, and stores to one dump address would queue up where stores along a row coalesce.

Two programs that store different rows for one column race, and either row is right.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.norm import normalized_at

NEIGHBOURS = tl.constexpr(8)  # candidate rows, in one load of a thread


def outlier_columns_reference(x: Tensor, threshold: float) -> Tensor:
    """``[K]`` bool: the columns of ``x [M, K]`` that hold an outlier."""
    return (x.to(torch.float32).abs() >= threshold).any(0)


def row_index_dtype(M: int) -> torch.dtype:
    """What can number M rows."""
    return torch.int16 if M < 2**15 else torch.int32


def candidate_rows(x: Tensor, threshold: float) -> Tensor:
    """A row with an outlier for each column that has one, and anything at all for the others.

    In operators that Inductor fuses with whatever computes ``x``.

    Args:
        x: ``[M, K]``, fp32, bf16 or fp16.
        threshold: an element is an outlier when ``|x| >= threshold``.

    Returns:
        ``[2, K]``, int16 where it can number M rows, else int32; only row 0 is for reading.
    """
    M, K = x.shape
    dtype = row_index_dtype(M)
    is_outlier = x.to(torch.float32).abs() >= threshold
    column = torch.arange(K, device=x.device)
    target = torch.where(is_outlier, column, column + K)
    rows = torch.arange(M, device=x.device).to(dtype).unsqueeze(1).expand(M, K)
    memory = torch.empty(2 * K, dtype=dtype, device=x.device)
    return torch.index_put(memory, (target,), rows).view(2, K)


@triton.jit
def load_candidates(candidates_ptr, k, M, K, SHORT: tl.constexpr):
    """For each of the columns ``k``: its candidate row, whether there is such a row, and the offset of
    its element; in 32 bits with SHORT, if no offset reaches 2**31, which is a third of the
    instructions."""
    row = tl.load(candidates_ptr + k, mask=k < K, other=-1).to(tl.int32)
    return row, (row >= 0) & (row < M), row * K + k if SHORT else row.to(tl.int64) * K + k


@triton.jit
def are_outliers(x, row, is_row, k, M, K, threshold, norm, NORM: tl.constexpr):
    """Which of the candidates are outliers; ``x`` is read as ``normalized_at`` has it.

    Args:
        x, row, is_row: the candidates' elements, their rows, and whether there are such rows.
    """
    x = normalized_at(x, row, is_row, k, k < K, M, norm, NORM)
    return is_row & (tl.abs(x.to(tl.float32)) >= threshold)


@triton.jit
def find_columns(
    candidates_ptr, x_ptr, columns_ptr, M, K, threshold, BLOCKS: tl.constexpr, SHORT: tl.constexpr,
    norm, NORM: tl.constexpr,
):  # fmt: skip
    """Writes the list of the columns that hold an outlier, in order; returns their number.

    Every program that calls this, or ``list_columns``, writes the same to the same places and reads
    back what it wrote itself, or the same written by another.
    """
    count = tl.full((), 0, tl.int32)
    block, within = tl.arange(0, BLOCKS)[:, None], tl.arange(0, NEIGHBOURS)[None, :]
    for start in range(0, K, NEIGHBOURS * BLOCKS):
        k = start + NEIGHBOURS * block + within
        row, is_row, offset = load_candidates(candidates_ptr, k, M, K, SHORT)
        # Loaded here: torch takes all that a call is given for written to, if the address of a store
        # depends on what it returns, and would copy x.
        x = tl.load(x_ptr + offset, mask=is_row, other=0.0)
        flag = are_outliers(x, row, is_row, k, M, K, threshold, norm, NORM)
        count = _append(columns_ptr, count, flag.to(tl.int32), k, True)
    tl.debug_barrier()
    return count


@triton.jit
def list_columns(taken_ptr, columns_ptr, K, BLOCKS: tl.constexpr):
    """The same of columns that are marked in ``taken [K]``."""
    count = tl.full((), 0, tl.int32)
    block, within = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 16)[None, :]
    for start in range(0, K, 16 * BLOCKS):
        k = start + 16 * block + within
        flag = tl.load(taken_ptr + k, mask=k < K, other=0).to(tl.int32)
        count = _append(columns_ptr, count, flag, k, False)
    tl.debug_barrier()
    return count


@triton.jit
def _append(columns_ptr, count, flag, k, EACH: tl.constexpr):
    """Adds the columns ``k`` whose flag is 1 to a list of ``count``; returns its new length.

    Args:
        flag, k: ``[blocks, neighbours]`` int32, the neighbours in one thread: a sum along threads costs
            an addition a warp for each of its terms.
        EACH: whether they are stored one after another: all at once Triton would deal out to other
            threads, and send 64 bits of address through shared memory for each. It takes registers.
    """
    total = tl.sum(flag, 1)
    before = count + tl.cumsum(total, 0) - total
    position = before[:, None] + tl.cumsum(flag, 1) - flag
    if EACH:
        _store_each(columns_ptr + position, k, flag)
    else:
        tl.store(columns_ptr + position, k, mask=flag != 0)
    return count + tl.sum(total, 0)


@triton.jit
def _store_each(pointers, values, flag):
    BLOCKS: tl.constexpr = flag.shape[0]
    COLUMNS: tl.constexpr = flag.shape[1]
    if COLUMNS == 1:
        one: tl.constexpr = (BLOCKS,)
        tl.store(tl.reshape(pointers, one), tl.reshape(values, one), mask=tl.reshape(flag, one) != 0)
    else:
        half: tl.constexpr = (BLOCKS, COLUMNS // 2, 2)
        pointers, other_pointers = tl.split(tl.reshape(pointers, half))
        values, other_values = tl.split(tl.reshape(values, half))
        flag, other_flag = tl.split(tl.reshape(flag, half))
        _store_each(pointers, values, flag)
        _store_each(other_pointers, other_values, other_flag)
