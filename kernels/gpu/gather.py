"""Quantise and gather: rows to int8, and the outlier columns of ``x`` and of the weights side by side.

One launch between the kernel that computes ``x`` and its candidate rows (``columns.py``), and the
product::

    C                       = outlier columns of x, in order
    x_scale[m], x_int8[m]   = row m quantised without the columns in C        (column decomposition)
    x_gathered[m, j]        = x[m, C[j]]
    w_gathered[n, j]        = w_int8[n, C[j]]                     of the first columns
    count                   = |C|

Some programs list C and gather, the others quantise: those ask which columns are outliers, and never
in what order, which is what takes the instructions. Neither waits for the other.

The outlier product then runs over contiguous operands that need no mask: both are zero from ``count``
up to the next multiple of ``BLOCK_O``. ``x_gathered`` has room for all of K, as x has. ``w_gathered``
has room for some of them (``w_capacity``), so that it stays small beside the weight: the product reads
the columns beyond from the weight itself, and nothing is ever dropped. Plain gathering inside the
product costs registers, and its pipelining.

Source: Dettmers et al. 2022, "LLM.int8()", section 3.2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.columns import NEIGHBOURS, find_columns, outlier_columns_reference
from int8fx.kernels.gpu.configs import COUNTERS
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.norm import normalized_at
from int8fx.kernels.gpu.rows import ROW_BYTES, chunks_of_row
from int8fx.kernels.gpu.tiles import BLOCK_O
from int8fx.kernels.gpu.without_columns import quantize_without_columns
from int8fx.kernels.ops.quantize_reference import quantize_reference

_LEAST_COLUMNS = 256
_FEW_ROWS, _MANY_ROWS = 256, 1024
_COUNTERS = tl.constexpr(COUNTERS)


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
def _gather(
    source_ptr, target_ptr, target_rows, source_rows, inside, columns_ptr, count, K, CAPACITY,
    M, threshold, SIFT: tl.constexpr, norm, NORM: tl.constexpr,
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
    candidates_ptr,  # [2, K], of which only the first row is read
    statistics_ptr,  # [2, M] fp32, where NORM
    norm_weight_ptr, norm_bias_ptr,  # [K], where NORM
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    x_int8_ptr,  # [M, K]
    x_scale_ptr,  # [M]
    x_gathered_ptr,  # [M, X_CAPACITY]
    w_gathered_ptr,  # [N0 + N1 + N2, W_CAPACITY]
    columns_ptr,  # [K] int32
    count_ptr,  # [1] int32
    counters_ptr,  # [COUNTERS] int32, which this makes zeros
    M, N0, N1, N2, K, X_CAPACITY, W_CAPACITY,
    threshold,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    GATHER_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs gather from ``GATHER_ROWS`` rows of a weight or of x each, the others quantise
    STEPS times ``ROWS`` rows of x. With NORM, of the norm of x (``norm.py``)."""
    norm = (statistics_ptr, norm_weight_ptr, norm_bias_ptr)
    # Fewer than 2**15 rows, and a row in registers has no more than 2**14 elements.
    SHORT: tl.constexpr = CHUNKS > 0 and candidates_ptr.dtype.element_ty == tl.int16
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    program = tl.program_id(0)
    first0 = tl.cdiv(N0, GATHER_ROWS)
    first1 = first0 + tl.cdiv(N1, GATHER_ROWS)
    of_x = first1 + tl.cdiv(N2, GATHER_ROWS)
    of_rows = of_x + tl.cdiv(M, GATHER_ROWS)
    if program < of_rows:
        count = find_columns(
            candidates_ptr, x_ptr, columns_ptr, M, K, limit, LIST_BLOCK, SHORT, norm, NORM
        )
        if program == 0:
            tl.store(count_ptr, count)
            tl.store(counters_ptr + tl.arange(0, _COUNTERS), tl.zeros((_COUNTERS,), tl.int32))
        if program < of_x:
            group = (program >= first0).to(tl.int32) + (program >= first1).to(tl.int32)
            block = program - pick(group, 0, first0, first1)
            n = block * GATHER_ROWS + tl.arange(0, GATHER_ROWS)
            inside = n < pick(group, N0, N1, N2)
            w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
            room = tl.minimum(count, W_CAPACITY)
            _gather(w_ptr, w_gathered_ptr, n + pick(group, 0, N0, N0 + N1), n, inside, columns_ptr,
                    room, K, W_CAPACITY, M, limit, False, None, "")  # fmt: skip
        else:
            m = (program - of_x) * GATHER_ROWS + tl.arange(0, GATHER_ROWS)
            # x that Inductor quantised comes without what is no outlier; a norm comes whole.
            SIFT: tl.constexpr = NORM != "" and not QUANTIZE
            _gather(x_ptr, x_gathered_ptr, m, m, m < M, columns_ptr,
                    count, K, X_CAPACITY, M, limit, SIFT, norm, NORM)  # fmt: skip
    elif QUANTIZE:
        first = (program - of_rows) * ROWS * STEPS
        quantize_without_columns(
            x_ptr, candidates_ptr, x_int8_ptr, x_scale_ptr, first, M, K, limit,
            ROWS, STEPS, CHUNK, CHUNKS, EVEN_K, SHORT, norm, NORM,
        )  # fmt: skip


def x_capacity(K: int) -> int:
    """Columns that there is room for in ``x_gathered``: all."""
    return -(-K // BLOCK_O.value) * BLOCK_O.value


def w_capacity(K: int) -> int:
    """Columns that there is room for in ``w_gathered``: what makes it an eighth of the int8 weight."""
    return min(x_capacity(K), x_capacity(max(_LEAST_COLUMNS, K // 16)))


def launch_shape(
    M: int, K: int, N: int, dtype: torch.dtype, norm: str = "", quantizes: bool = True
) -> dict[str, int | bool]:
    """The kernel's block sizes for M rows of K elements, and weights of N channels together.

    Every program that gathers lists the outlier columns for itself, and every one that quantises asks
    for each whether it is one: few and large programs, as long as there are enough for all processors.
    Only M's class is looked at, as in ``configs.gemm_configs``.
    """
    few, many = M <= _FEW_ROWS, M > _MANY_ROWS
    together = 2 if few else 16 if many else 8
    warps, chunks = _chunks(K, dtype)
    # Who quantises as well has the registers to list 32 columns a lane at once.
    of_lane = 32 if quantizes else 16
    listed = min(max(32, triton.next_power_of_2(K)), 32 * of_lane * min(warps, 8))
    rows = _rows_at_once(warps, chunks, dtype, norm, together)
    return chunks | {
        "ROWS": rows,
        "STEPS": together // rows if chunks["CHUNKS"] else 1,
        "GATHER_ROWS": 64 if few and N <= 4096 else 128 if N <= 8192 else 256,
        "LIST_BLOCK": listed // NEIGHBOURS.value,
        "num_warps": warps,
    }


def _chunks(K: int, dtype: torch.dtype) -> tuple[int, dict[str, int | bool]]:
    """Warps, and the chunks of a row: one, or three to eight where that leaves fewer elements past the
    end. Of a row too long for registers there is no number of them."""
    if K * dtype.itemsize > ROW_BYTES:
        return 16, chunks_of_row(K, 4096) | {"CHUNKS": 0}
    row = max(32, triton.next_power_of_2(K))
    candidates = [(min(max(row // 512, 4), 16), chunks_of_row(K, row))] if row <= 8192 else []
    candidates += [(warps, chunks_of_row(K, 256 * warps)) for warps in (8, 4)]
    fits = [each for each in candidates if each[1]["CHUNKS"] == 1 or 2 < each[1]["CHUNKS"] <= 8]
    return min(fits, key=lambda each: each[1]["CHUNK"] * each[1]["CHUNKS"])


def _rows_at_once(
    warps: int, chunks: dict[str, int | bool], dtype: torch.dtype, norm: str, most: int
) -> int:
    """As many rows as registers hold for two programs on a processor, or for one of long rows: what a
    row takes once is then shared by more elements of a lane."""
    of_lane = chunks["CHUNK"] * max(chunks["CHUNKS"], 1) // (32 * warps)
    limit = 112 if chunks["CHUNKS"] > 4 else 64
    is_bf16, is_layer = dtype == torch.bfloat16, norm.startswith("layer")
    if dtype == torch.float32 or (is_bf16 and norm) or (is_layer and warps == 16):
        limit //= 2
    return max(rows for rows in (1, 2, 4) if rows == 1 or (rows <= most and rows * of_lane <= limit))


def programs(shape: dict[str, int | bool], M: int, widths: Sequence[int], quantizes: bool) -> int:
    """How many programs the kernel takes."""
    gather = sum(-(-rows // shape["GATHER_ROWS"]) for rows in (M, *widths))
    return gather + (-(-M // (shape["ROWS"] * shape["STEPS"])) if quantizes else 0)
