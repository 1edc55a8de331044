"""Decode: the whole linear in one launch, for M <= 16.

    y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias

Reading the weight is all the time there is, so the loop over K is two loads and an int8 product.

**RESIDUES.** Where rows quantise alone (one row, or the token decomposition), the kernel that computes
x writes what this one multiplies: ``x_int8`` and the outliers as int8 residues (``residues.py``), which
are more rows of the same tile. A token's rows are summed at the end.

**QUANTIZE.** 2 to 16 rows in the column decomposition need each other before they are quantised. They
are small and stay in L2, so each program does it for itself, before its product: it looks at all of x
once, for the outlier columns and the scales, and quantises the part of K that it multiplies. The
columns that were left out come after the product, in a loop over them alone.

**Split K.** With few output channels there are fewer tiles than multiprocessors. Then SPLIT_K programs
share a tile, each with its part of K. What becomes of their partial sums:

- Where a kernel that Inductor writes reads ``y``, the result is ``[SPLIT_K, M, N]`` in fp32, and that
  kernel adds them up as it reads them, which costs nothing.
- Where none does (``y`` leaves the graph, or attention reads it), that would be a launch. With SUMS the
  programs count themselves: whoever finds that it came last to a tile adds up the parts.

The counters are zeros that the kernel which computes x writes (``zeros_for_counters``): neither a fill
nor memory that outlives a call and that two streams could share. The order of summation is fixed in
both, so a result is the same bits every time.

Source: Dettmers et al. 2022, "LLM.int8()", equation 8. References:
``kernels/ops/quantize_reference.py`` and
``kernels/ops/linear_reference.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.columns import list_columns
from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.residues import scale_of_residue
from int8fx.kernels.gpu.rounding import folded, quantize, scale_of_rows
from int8fx.kernels.gpu.split import sum_of_tile
from int8fx.kernels.gpu.tiles import STEP_O, of_columns, wrapped_range
from int8fx.kernels.ops.limits import DECODE_ROWS
from int8fx.kernels.ops.linear_reference import linear_reference
from int8fx.kernels.ops.quantize_reference import quantize_reference

MAX_M = DECODE_ROWS
_LIST_BLOCK = 256  # times 16 columns
_VECTOR_BYTES = 16  # of x, in one load of a thread


def quantized_linear_reference(
    x: Tensor,
    threshold: float,
    decomposition: str,
    w_int8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The formula above in plain PyTorch: ``[M, K]`` in, ``[M, N]`` of x's dtype out."""
    x_int8, x_scale, x_outlier, columns = quantize_reference(x, threshold, decomposition)
    without = threshold == 0
    return linear_reference(
        x_int8,
        x_scale,
        x if without else x_outlier,
        None if without else columns,
        w_int8,
        w_scale,
        bias,
    )


def tile_rows(M: int, residues: int) -> int:
    """BLOCK_M: the rows of a tile, as few as a matrix instruction takes."""
    return 16 if M * (1 + residues) <= 16 else MAX_M * (1 + residues)


def scan_shape(itemsize: int, num_warps: int, warp_size: int, columns: int) -> dict[str, int]:
    """Block sizes of what QUANTIZE does before and after the product.

    Args:
        itemsize: of x, in bytes.
        columns: of x that one program multiplies.
    """
    vector = _VECTOR_BYTES // itemsize
    scanned = num_warps * warp_size * vector
    return {
        "SCAN_BLOCK": scanned,
        "VECTOR": vector,
        "QUANTIZE_BLOCK": min(scanned // 2, triton.next_power_of_2(columns)),
        "LIST_BLOCK": _LIST_BLOCK,
    }


def zeros_for_counters(x: Tensor) -> Tensor:
    """Zeros for the counters of tiles, int8 of x's shape.

    In an operator of x, so that Inductor fuses it with whatever computes x: a ``torch.zeros`` would be
    a launch. Where K is split it is long enough for four bytes a tile.
    """
    return (x.isnan() & x.isinf()).to(torch.int8)


def sum_of_parts(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y`` of the partial sums ``[SPLIT_K, M, N]``.

    Term by term, which Inductor fuses with whatever reads ``y``; a reduction would be a launch.
    """
    y, *others = parts.unbind(0)
    for part in others:
        y = y + part
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


@triton.jit
def _scan(
    x_ptr, x_scale_ptr, taken_ptr, M, K, threshold,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes ``x_scale [M]``, and which columns hold an outlier to ``taken [K]``.

    Every program writes the same to the same places, and reads back what it wrote itself, or the same
    from another. A thread loads VECTOR columns of all rows, so that maxima over rows stay in it.
    """
    row = tl.arange(0, ROWS)
    # Rows and columns past the end look at others again: no masks, and the maxima stay as they are.
    offset = (row % M)[:, None] * K
    absmax = tl.zeros((ROWS, BLOCK_K // VECTOR), x_ptr.dtype.element_ty)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.abs(tl.load(x_ptr + (offset + (k % K)[None, :])))
        # Maxima need no conversion: two of fp16 are one instruction.
        taken = tl.reduce(x, 0, tl.standard._elementwise_max).to(tl.float32) >= threshold
        tl.store(taken_ptr + k, taken.to(tl.int8), mask=k < K)
        limit = tl.where(taken, 0.0, float("inf")).to(x_ptr.dtype.element_ty)
        regular = tl.minimum(x, limit[None, :], propagate_nan=tl.PropagateNan.ALL)
        absmax = tl.maximum(absmax, folded(regular, VECTOR), propagate_nan=tl.PropagateNan.ALL)
    tl.store(x_scale_ptr + row, scale_of_rows(absmax.to(tl.float32)), mask=row < M)
    tl.debug_barrier()


@triton.jit
def _quantize_columns(
    x_ptr, x_int8_ptr, x_scale_ptr, taken_ptr, first, last, M, K,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes ``x_int8`` of columns ``first`` to ``last``, as all programs that need them do."""
    row = tl.arange(0, ROWS)
    x_scale = tl.load(x_scale_ptr + row % M)
    offset = (row % M)[:, None] * K
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (row < M)[:, None] & (k < last)[None, :]
        taken = tl.load(taken_ptr + k, mask=k < last, other=1) != 0
        x = tl.load(x_ptr + offset + (k % K)[None, :]).to(tl.float32)
        regular = tl.where(taken[None, :], 0.0, x)
        x_int8 = quantize(regular, x_scale[:, None], x_ptr.dtype.element_ty != tl.float32)
        tl.store(x_int8_ptr + offset + k[None, :], x_int8, mask=inside)
    tl.debug_barrier()


@triton.jit
def add_outlier_columns(
    acc, x_row, inside, w_row, columns_ptr, first, last, PRECISION: tl.constexpr
):  # fmt: skip
    """``acc + x[:, C] @ w[:, C]ᵀ``, C: entries ``first`` to ``last`` of the list of outlier columns.

    Args:
        x_row, w_row: pointers to rows, ``[M, 1]`` and ``[1, N]``.
        inside: ``[M]``, which rows of x may be read.
    """
    dtype = x_row.dtype.element_ty
    for start in range(first, last, STEP_O):
        j = start + tl.arange(0, STEP_O)
        wanted = j < last
        k = tl.load(columns_ptr + j, mask=wanted, other=0)
        x = tl.load(x_row + k[None, :], mask=inside[:, None] & wanted[None, :], other=0.0)
        w = tl.load(w_row + k[:, None], mask=wanted[:, None], other=0)
        acc = tl.dot(x, w.to(dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def decode_kernel(
    x_ptr,  # [M, K], where QUANTIZE
    x_int8_ptr, x_scale_ptr,  # [M, K] int8 and [M] fp32; where QUANTIZE they are written
    residue0_ptr, residue1_ptr, residue2_ptr,  # [M, K] int8, where RESIDUES
    residue_scale_ptr,  # [M] fp32, where RESIDUES
    taken_ptr, columns_ptr,  # [K] int8 and int32, to work with, where QUANTIZE
    parts_ptr, counters_ptr,  # see sum_of_tile, where SUMS
    w0_ptr, w1_ptr, w2_ptr,  # [N, K] int8
    w_scale0_ptr, w_scale1_ptr, w_scale2_ptr,  # [N] fp32
    bias0_ptr, bias1_ptr, bias2_ptr,  # [N], or None
    y0_ptr, y1_ptr, y2_ptr,  # [M, N]; [SPLIT_K, M, N] fp32 where K is split, and not SUMS
    M, N0, N1, N2, K,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SUMS: tl.constexpr,
    SCAN_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    QUANTIZE_BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    RESIDUES: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    tile_n, part = tl.program_id(0), tl.program_id(1)
    N, w_ptr, w_scale_ptr, bias_ptr, y_ptr = N0, w0_ptr, w_scale0_ptr, bias0_ptr, y0_ptr
    if GROUPED:
        first0 = tl.cdiv(N0, BLOCK_N)
        first1 = first0 + tl.cdiv(N1, BLOCK_N)
        group = (tile_n >= first0).to(tl.int32) + (tile_n >= first1).to(tl.int32)
        tile_n -= pick(group, 0, first0, first1)
        N = pick(group, N0, N1, N2)
        w_ptr = pick(group, w0_ptr, w1_ptr, w2_ptr)
        w_scale_ptr = pick(group, w_scale0_ptr, w_scale1_ptr, w_scale2_ptr)
        y_ptr = pick(group, y0_ptr, y1_ptr, y2_ptr)
        if HAS_BIAS:
            bias_ptr = pick(group, bias0_ptr, bias1_ptr, bias2_ptr)
    # Rows of the tile: x_int8 of all tokens, then each residue of all tokens.
    GROUPS: tl.constexpr = 1 + RESIDUES
    TOKENS: tl.constexpr = BLOCK_M // GROUPS
    row = tl.arange(0, BLOCK_M)
    residue = row // TOKENS - 1
    # Rows and columns past the end read others, and are not stored: loads without masks pipeline.
    token = (row % TOKENS) % M
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = wrapped_range(tile_n * BLOCK_N, N, BLOCK_N)
    # The part of K that is this program's.
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = part * length
    last = tl.minimum(first + length, K)
    count = 0
    if QUANTIZE:
        _scan(x_ptr, x_scale_ptr, taken_ptr, M, K, limit, BLOCK_M, SCAN_BLOCK, VECTOR)
        count = list_columns(taken_ptr, columns_ptr, K, LIST_BLOCK)
        _quantize_columns(
            x_ptr, x_int8_ptr, x_scale_ptr, taken_ptr, first, last, M, K, BLOCK_M, QUANTIZE_BLOCK
        )
    w_row = w_ptr + n.to(tl.int64)[None, :] * K
    k = first + tl.arange(0, BLOCK_K)
    x_offset = (token * K)[:, None]
    if RESIDUES:
        # The residues' distance from x_int8. Every allocation starts at a multiple of 16 bytes; a
        # choice between pointers would lose that, and asynchronous copies with it.
        here = x_int8_ptr.to(tl.int64)
        distance0, distance1 = residue0_ptr.to(tl.int64) - here, residue1_ptr.to(tl.int64) - here
        distance2 = residue2_ptr.to(tl.int64) - here
        distance = tl.where(residue == 0, distance0, tl.where(residue == 1, distance1, distance2))
        x_offset += tl.multiple_of(tl.where(residue < 0, 0, distance), 16)[:, None]
    x_tile = x_int8_ptr + x_offset + k[None, :]
    w_tile = w_row + k[:, None]
    acc_int32 = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            x_int8, w = tl.load(x_tile), tl.load(w_tile)
        else:
            inside = start + tl.arange(0, BLOCK_K) < K
            x_int8 = tl.load(x_tile, mask=inside[None, :], other=0)
            w = tl.load(w_tile, mask=inside[:, None], other=0)
        acc_int32 = tl.dot(x_int8, w, acc_int32, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    scale = tl.load(x_scale_ptr + token)
    if RESIDUES:
        residue_scale = scale_of_residue(tl.load(residue_scale_ptr + token), residue)
        scale = tl.where(residue < 0, scale, residue_scale)
    y = acc_int32.to(tl.float32) * scale[:, None]
    if QUANTIZE:
        share = tl.cdiv(count, SPLIT_K)
        y = add_outlier_columns(
            y, x_ptr + (row * K)[:, None], row < M, w_row, columns_ptr,
            part * share, tl.minimum(part * share + share, count), PRECISION,
        )  # fmt: skip
    if RESIDUES:
        y = tl.sum(tl.reshape(y, (GROUPS, TOKENS, BLOCK_N)), 0)
    m = tl.arange(0, TOKENS)
    inside = (m < M)[:, None] & (columns < N)[None, :]
    if SUMS:
        y, is_last = sum_of_tile(y, part, parts_ptr, counters_ptr, SPLIT_K)
        inside &= is_last
        part = 0  # of one result
    y *= of_columns(w_scale_ptr, columns, N)[None, :]
    if HAS_BIAS:
        y += of_columns(bias_ptr, columns, N)[None, :]
    target = y_ptr + (part * M + m)[:, None] * N + columns[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)
