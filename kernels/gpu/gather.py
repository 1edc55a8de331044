"""Quantise and gather: rows to int8, and the outlier columns of ``x`` and of the weights side by side.

One launch between the kernel that computes ``x`` (and its witness, ``columns.py``) and the product::

    C                       = outlier columns of x, in order
    x_scale[m], x_int8[m]   = row m quantised without the columns in C        (column decomposition)
    x_gathered[m, j]        = x[m, C[j]]
    w_gathered[n, j]        = w_int8[n, C[j]]
    count                   = |C|

Some programs list C and gather, the others quantise: those ask which columns are outliers, and never
in what order, which is what takes the instructions. Neither waits for the other.

The outlier product then runs over contiguous operands that need no mask: both are zero from ``count``
up to the next multiple of ``BLOCK_O``. Their capacity is all of K, so nothing is ever dropped; memory
beyond what is written is not touched. Plain gathering inside the product costs it 60 registers a
thread, and its pipelining.

Source: Dettmers et al. 2022, "LLM.int8()", section 3.2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.columns import (
    find_columns,
    is_outlier_column,
    outlier_columns_reference,
)
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.norm import neighbours, normalized_at
from int8fx.kernels.gpu.rounding import folded, quantize, scale_of_rows
from int8fx.kernels.quantize import quantize_reference

BLOCK_O = 32
_FEW_ROWS, _MANY_ROWS = 256, 1024
_ROW_BYTES = 32768  # of x, of the longest row that a program keeps in registers
_LONG = 16384  # bytes: of longer rows four at once do not stay in registers
_LIST = 8192  # columns of the witness, in one step
_NEIGHBOURS = 8  # columns of the witness, in one load of a thread


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
    x_ptr, witness_ptr, x_int8_ptr, x_scale_ptr, first, M, K, threshold,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
    SHORT: tl.constexpr = False, norm=None, NORM: tl.constexpr = "",
):  # fmt: skip
    """Writes ``x_int8`` and ``x_scale`` of STEPS times ROWS rows from ``first``; with ONE_BLOCK they
    stay in registers between, and so does what is known of the columns."""
    k = neighbours(BLOCK_K)
    if ONE_BLOCK:
        cap = _cap(x_ptr, witness_ptr, k, M, K, threshold, SHORT, norm, NORM)
        for step in range(STEPS):
            rows = first + step * ROWS + tl.arange(0, ROWS)
            x = _regular(x_ptr, rows, k, cap, M, K, norm, NORM)
            x_scale = _scale(x_scale_ptr, rows, _absmax(x).to(tl.float32), M)
            _store_int8(x_int8_ptr, rows, k, x, x_scale, M, K)
    else:
        tl.static_assert(STEPS == 1)
        rows = first + tl.arange(0, ROWS)
        cap = _cap(x_ptr, witness_ptr, k, M, K, threshold, SHORT, norm, NORM)
        absmax = _absmax(_regular(x_ptr, rows, k, cap, M, K, norm, NORM))
        for start in range(BLOCK_K, K, BLOCK_K):
            cap = _cap(x_ptr, witness_ptr, start + k, M, K, threshold, SHORT, norm, NORM)
            more = _absmax(_regular(x_ptr, rows, start + k, cap, M, K, norm, NORM))
            absmax = tl.maximum(absmax, more, propagate_nan=tl.PropagateNan.ALL)
        x_scale = _scale(x_scale_ptr, rows, absmax.to(tl.float32), M)
        for start in range(0, K, BLOCK_K):
            cap = _cap(x_ptr, witness_ptr, start + k, M, K, threshold, SHORT, norm, NORM)
            again = _regular(x_ptr, rows, start + k, cap, M, K, norm, NORM)
            _store_int8(x_int8_ptr, rows, start + k, again, x_scale, M, K)


@triton.jit
def _cap(
    x_ptr, witness_ptr, k, M, K, threshold, SHORT: tl.constexpr, norm, NORM: tl.constexpr
):  # fmt: skip
    """0 for the columns ``k`` that hold an outlier, and NaN for the others; see ``_regular``."""
    taken = is_outlier_column(witness_ptr, x_ptr, k, M, K, threshold, SHORT, norm, NORM)
    return tl.where(taken, 0.0, float("nan"))


@triton.jit
def _regular(x_ptr, rows, k, cap, M, K, norm, NORM: tl.constexpr):
    """``x [rows, k]``, zero in outlier columns, whatever they hold: NaN and infinity as well.

    As ``k`` has two dimensions, this has three. Outlier columns are loaded too: under their mask a load
    would be one of two bytes.
    """
    row = (rows % M).to(tl.int64)[:, None, None]  # those past the end look at others again
    column, inside = k[None, :, :], (k < K)[None, :, :]
    x = tl.load(x_ptr + row * K + column, mask=inside, other=0.0)
    x = normalized_at(x, row, True, column, inside, M, norm, NORM)
    # Of a number and NaN minimum and maximum are the number. Two of fp16 are one instruction, where
    # tl.where takes them apart.
    cap = cap.to(x.dtype)[None, :, :]
    return tl.maximum(tl.minimum(x, cap), cap)


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


@triton.jit
def _gather(
    source_ptr, target_ptr, target_rows, source_rows, inside, columns_ptr, count, K, CAPACITY,
    BLOCK_O: tl.constexpr,
    M=None, threshold=None, SIFT: tl.constexpr = False, norm=None, NORM: tl.constexpr = "",
):  # fmt: skip
    """``target[r, j] = source[r, columns[j]]``, zero from ``count`` to the end of its block, and with
    SIFT what is no outlier."""
    source = source_rows.to(tl.int64)[:, None] * K
    target = target_rows.to(tl.int64)[:, None] * CAPACITY
    for start in range(0, count, BLOCK_O):
        j = start + tl.arange(0, BLOCK_O)
        column = tl.load(columns_ptr + j, mask=j < count, other=0)
        wanted = inside[:, None] & (j < count)[None, :]
        values = tl.load(source_ptr + source + column[None, :], mask=wanted, other=0)
        row, has_row, has_k = source_rows[:, None], inside[:, None], (j < count)[None, :]
        values = normalized_at(values, row, has_row, column[None, :], has_k, M, norm, NORM)
        if SIFT:
            values = tl.where(tl.abs(values.to(tl.float32)) >= threshold, values, 0.0)
        values = values.to(target_ptr.dtype.element_ty)
        tl.store(target_ptr + target + j[None, :], values, mask=inside[:, None])


@triton.jit
def quantize_gather_kernel(
    x_ptr,  # [M, K]
    witness_ptr,  # [2, K], of which only the first row is read
    statistics_ptr,  # [2, M] fp32, where NORM
    norm_weight_ptr, norm_bias_ptr,  # [K], where NORM
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    x_int8_ptr,  # [M, K]
    x_scale_ptr,  # [M]
    x_gathered_ptr,  # [M, CAPACITY]
    w_gathered_ptr,  # [N0 + N1 + N2, CAPACITY]
    columns_ptr,  # [K] int32, to work with
    count_ptr,  # [1] int32
    counters_ptr,  # [COUNTERS] int32, which this makes zeros
    M, N0, N1, N2, K, CAPACITY,
    threshold,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    GATHER_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """The first programs gather from ``GATHER_ROWS`` rows of a weight or of x each, the others quantise
    STEPS times ``ROWS`` rows of x. With NORM, of the norm of x (``norm.py``)."""
    norm = (statistics_ptr, norm_weight_ptr, norm_bias_ptr)
    # Fewer than 2**15 rows, and a row in registers has no more than 2**14 elements.
    SHORT: tl.constexpr = ONE_BLOCK and witness_ptr.dtype.element_ty == tl.int16
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    program = tl.program_id(0)
    first0 = tl.cdiv(N0, GATHER_ROWS)
    first1 = first0 + tl.cdiv(N1, GATHER_ROWS)
    of_x = first1 + tl.cdiv(N2, GATHER_ROWS)
    of_rows = of_x + tl.cdiv(M, GATHER_ROWS)
    if program < of_rows:
        count = find_columns(
            witness_ptr, x_ptr, columns_ptr, M, K, limit, NEIGHBOURS, LIST_BLOCK, SHORT, norm, NORM
        )
        if program == 0:
            tl.store(count_ptr, count)
            tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))
        if program < of_x:
            group = (program >= first0).to(tl.int32) + (program >= first1).to(tl.int32)
            block = program - pick(group, 0, first0, first1)
            n = block * GATHER_ROWS + tl.arange(0, GATHER_ROWS)
            inside = n < pick(group, N0, N1, N2)
            w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
            _gather(w_ptr, w_gathered_ptr, n + pick(group, 0, N0, N0 + N1), n, inside, columns_ptr,
                    count, K, CAPACITY, BLOCK_O)  # fmt: skip
        else:
            m = (program - of_x) * GATHER_ROWS + tl.arange(0, GATHER_ROWS)
            # x that Inductor quantised comes without what is no outlier; a norm comes whole.
            SIFT: tl.constexpr = NORM != "" and not QUANTIZE
            _gather(x_ptr, x_gathered_ptr, m, m, m < M, columns_ptr,
                    count, K, CAPACITY, BLOCK_O, M, limit, SIFT, norm, NORM)  # fmt: skip
    elif QUANTIZE:
        first = (program - of_rows) * ROWS * STEPS
        quantize_without_columns(
            x_ptr, witness_ptr, x_int8_ptr, x_scale_ptr, first, M, K, limit,
            ROWS, STEPS, BLOCK_K, ONE_BLOCK, SHORT, norm, NORM,
        )  # fmt: skip


def launch_shape(
    M: int, K: int, N: int, dtype: torch.dtype, norm: str = "", quantizes: bool = True
) -> dict[str, int | bool]:
    """The kernel's block sizes for M rows of K elements, and weights of N channels together.

    Every program that gathers lists the outlier columns for itself, and every one that quantises asks
    for each whether it is one: few and large programs, as long as there are enough for all processors.
    Only M's class is looked at, as in ``configs.gemm_configs``. Eight rows at once would take all
    registers of an A100, and four long ones, or four with their norm in bf16, too many of an H100. A
    program that quantises long ones has a processor for itself: 8 warps with the registers of 16, which
    reduce fewer partial results. Narrow blocks take fewer warps: with 48 registers a thread, as eight
    warps leave at K = 512, ptxas spills around the slow path of the division on sm_90.
    """
    few, many = M <= _FEW_ROWS, M > _MANY_ROWS
    together = 2 if few else 16 if many else 8
    row = max(32, triton.next_power_of_2(K))
    block = min(row, _ROW_BYTES // dtype.itemsize)
    is_whole, is_long = row == block, block * dtype.itemsize > _LONG
    with_norm = norm != "" and (dtype != torch.float16 or block > 4096)
    rows = 2 if few or is_long or with_norm else 4
    alone = is_long and is_whole and quantizes
    return {
        "ROWS": rows,
        "STEPS": together // rows if is_whole else 1,
        "GATHER_ROWS": 64 if few and N <= 4096 else 128 if N <= 8192 else 256,
        "BLOCK_K": block,
        "ONE_BLOCK": is_whole,
        "NEIGHBOURS": _NEIGHBOURS,
        "LIST_BLOCK": min(block, _LIST) // _NEIGHBOURS,
        "BLOCK_O": BLOCK_O,
        "num_warps": 4 if block <= 512 else 8 if block <= 4096 or alone else 16,
    }


def programs(shape: dict[str, int | bool], M: int, widths: Sequence[int], quantizes: bool) -> int:
    """How many programs the kernel takes."""
    gather = sum(-(-rows // shape["GATHER_ROWS"]) for rows in (M, *widths))
    return gather + (-(-M // (shape["ROWS"] * shape["STEPS"])) if quantizes else 0)
