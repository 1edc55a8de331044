"""Rows to int8 behind a rotation, and a few of their columns apart; of a norm's result as well.

    h                     = x, or its norm (``norm.py``), x the sum of two tensors or one
    x_columns[m]          = h[m, columns]                                  zero up to ROOM
    x_scale[m], x_int8[m] = row m of rotated(h without columns), quantised

Linears of one x share this where they keep the same columns, which the device alone knows: which
columns are kept may change from call to call, and the host does not wait. So there are as many **sets**
of results as linears. Whose columns are those of the first linear does nothing for its set, and
``sets`` names the one that its product reads.

Bit for bit what ``kernels/ops/rotated_linear.py`` has, where scales are above 2⁻¹⁰². One launch takes
the place of those that find outliers, gather them and quantise.
"""

import triton
import triton.language as tl

from int8fx.kernels.gpu.groups import pick
from int8fx.kernels.gpu.hadamard import rotated_chunk
from int8fx.kernels.gpu.norm import load_row, normalized, statistics_of_row
from int8fx.kernels.gpu.rounding import MIN_SCALE, corrected_int8
from int8fx.kernels.gpu.rows import (
    ROW_BYTES,
    appended,
    chunk_of_columns,
    load_columns,
    store_columns,
)

_LOOPED = 4096  # columns of a chunk, where a row does not stay in registers
_OF_LANE = 40  # columns of a row, which are in fp32


def rotate_shape(K: int, size: int, itemsize: int) -> dict[str, int | bool]:
    """The kernel's chunks of whole blocks, and its warps, for rows of K elements.

    Args:
        size: of a block, which need not divide K.
        itemsize: of an element, in bytes.
    """
    length = -(-K // size) * size
    in_registers = K * itemsize <= ROW_BYTES
    warps = triton.next_power_of_2(-(-length // (32 * _OF_LANE)))
    chunk = min(256 * warps, max(size, 32, triton.next_power_of_2(length)))
    chunk = chunk if in_registers else _LOOPED
    return {
        "CHUNK": chunk,
        "CHUNKS": -(-length // chunk) if in_registers else 0,
        "EVEN_K": K % chunk == 0,
        "num_warps": warps if in_registers else 16,
    }


def columns_room(columns: int) -> int:
    """What the product reads of so many static columns: whole steps of a matrix instruction."""
    return max(16, triton.next_power_of_2(columns))


@triton.jit
def _without_columns(h, index, columns_ptr, COLUMNS: tl.constexpr):
    """``h [n / 8, 8]``, a chunk of a row, and 0 in the static columns."""
    if COLUMNS == 0:
        return h
    else:
        EIGHTS: tl.constexpr = h.shape[0]
        eight = index * EIGHTS + tl.arange(0, EIGHTS)
        taken = tl.zeros((EIGHTS,), tl.int32)
        for number in range(COLUMNS):
            column = tl.load(columns_ptr + number)
            taken |= tl.where(eight == column >> 3, 1 << (column & 7), 0)
        is_taken = (taken[:, None] >> tl.arange(0, 8)[None, :]) & 1
        return tl.where(is_taken != 0, 0.0, h)


@triton.jit
def _chunk(
    x, index, K, columns_ptr, statistics, norm, NORM: tl.constexpr, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, RANDOM: tl.constexpr, CHUNK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """What is quantised of a chunk that was read. Past the end of a row x is zero, and so is this."""
    k = chunk_of_columns(index, CHUNK)
    h = x
    if NORM != "":
        mean, rstd = statistics
        weight_ptr, bias_ptr = norm
        weight = load_columns(weight_ptr, k, K, EVEN_K)
        bias = weight
        if NORM == "layer, bias":
            bias = load_columns(bias_ptr, k, K, EVEN_K)
        h = normalized(x, mean, rstd, weight, bias, NORM)
    return rotated_chunk(_without_columns(h, index, columns_ptr, COLUMNS), k, SIZE, RANDOM)


@triton.jit
def _largest(bits, values):
    """The largest magnitudes so far, as integers: of these NaN is the largest."""
    return tl.maximum(bits, tl.abs(values).to(tl.int32, bitcast=True))


@triton.jit
def _scale_of_row(bits):
    absmax = tl.max(tl.max(bits, 1), 0).to(tl.float32, bitcast=True)
    return tl.maximum(tl.div_rn(absmax, 127.0), MIN_SCALE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_columns_of_row(
    x_row, addend_row, target, columns_ptr, statistics, norm,
    NORM: tl.constexpr, ADDS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """``h`` at the static columns."""
    number = tl.arange(0, ROOM)
    inside = number < COLUMNS
    k = tl.load(columns_ptr + number, mask=inside, other=0)
    h = tl.load(x_row + k, mask=inside, other=0.0)
    if ADDS:
        addend = tl.load(addend_row + k, mask=inside, other=0.0)
        h = (h.to(tl.float32) + addend.to(tl.float32)).to(h.dtype)
    if NORM != "":
        mean, rstd = statistics
        weight_ptr, bias_ptr = norm
        weight = tl.load(weight_ptr + k, mask=inside, other=0.0)
        bias = weight
        if NORM == "layer, bias":
            bias = tl.load(bias_ptr + k, mask=inside, other=0.0)
        h = tl.where(inside, normalized(h, mean, rstd, weight, bias, NORM), 0.0)
    tl.store(target + number, h.to(target.dtype.element_ty))


@triton.jit
def _rotate_row(
    source, norm, results, columns_ptr, m, M, K, eps,
    NORM: tl.constexpr, ADDS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr,
    SIZE: tl.constexpr, RANDOM: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Of one row and one set everything. Its chunks stay in registers; with CHUNKS = 0 each is rotated
    twice, for the scale and for the integers.

    Args:
        source: pointers to x, and where ADDS to the addend and to the sum.
        norm: to its weight and bias.
        results: to ``x_int8``, ``x_scale`` and ``x_columns`` of the set.
    """
    x_ptr, addend_ptr, sum_ptr = source
    x_int8_ptr, x_scale_ptr, x_columns_ptr = results
    here, length = m.to(tl.int64) * K, tl.cdiv(K, SIZE) * SIZE
    int8_row = x_int8_ptr + m.to(tl.int64) * length
    statistics = (0.0, 0.0)
    bits = tl.zeros((CHUNK // 8, 8), tl.int32)
    if CHUNKS > 0:
        row = load_row(x_ptr, addend_ptr, sum_ptr, here, K, ADDS, CHUNK, CHUNKS, EVEN_K)
        if NORM != "":
            statistics = statistics_of_row(row, K, eps, NORM, CHUNK, CHUNKS, EVEN_K)
        rotated = ()
        for index in tl.static_range(CHUNKS):
            values = _chunk(
                row[index], index, K, columns_ptr, statistics, norm, NORM, COLUMNS, SIZE, RANDOM,
                CHUNK, EVEN_K,
            )  # fmt: skip
            bits = _largest(bits, values)
            rotated = appended(rotated, values)
        x_scale = _scale_of_row(bits)
        for index in tl.static_range(CHUNKS):
            x_int8 = corrected_int8(rotated[index], x_scale, EXACT)
            store_columns(int8_row, chunk_of_columns(index, CHUNK), x_int8, length, EVEN_K)
    else:
        tl.static_assert(NORM == "" and not ADDS)
        for index in range(0, tl.cdiv(length, CHUNK)):
            x = load_columns(x_ptr + here, chunk_of_columns(index, CHUNK), K, EVEN_K)
            values = _chunk(
                x, index, K, columns_ptr, statistics, norm, NORM, COLUMNS, SIZE, RANDOM, CHUNK, EVEN_K
            )
            bits = _largest(bits, values)
        x_scale = _scale_of_row(bits)
        for index in range(0, tl.cdiv(length, CHUNK)):
            k = chunk_of_columns(index, CHUNK)
            x = load_columns(x_ptr + here, k, K, EVEN_K)
            values = _chunk(
                x, index, K, columns_ptr, statistics, norm, NORM, COLUMNS, SIZE, RANDOM, CHUNK, EVEN_K
            )
            store_columns(int8_row, k, corrected_int8(values, x_scale, EXACT), length, EVEN_K)
    tl.store(x_scale_ptr + m, x_scale)
    if COLUMNS > 0:
        target = x_columns_ptr + m.to(tl.int64) * ROOM
        _store_columns_of_row(
            x_ptr + here, addend_ptr + here if ADDS else x_ptr, target, columns_ptr, statistics, norm,
            NORM, ADDS, COLUMNS, ROOM,
        )  # fmt: skip


@triton.jit
def rotate_kernel(
    x_ptr,  # [M, K]
    addend_ptr,  # [M, K], where ADDS
    sum_ptr,  # [M, K], where ADDS: x + addend
    weight_ptr,  # [K], where NORM
    bias_ptr,  # [K], where the norm has one
    columns0_ptr, columns1_ptr, columns2_ptr,  # [COLUMNS] int32, of each linear
    x_int8_ptr,  # [SETS, M, K'], K' the next multiple of SIZE
    x_scale_ptr,  # [SETS, M] fp32
    x_columns_ptr,  # [SETS, M, ROOM]
    sets_ptr,  # [SETS] int32, where there are several: the set that each linear reads
    counters_ptr,  # [COUNTERS] int32, which this makes zeros
    M, K,
    eps,
    NORM: tl.constexpr,
    ADDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROOM: tl.constexpr,
    SETS: tl.constexpr,
    SIZE: tl.constexpr,
    RANDOM: tl.constexpr,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """A row of a set for each program."""
    m, set_number = tl.program_id(0), tl.program_id(1)
    if m + set_number == 0:
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))
    source, norm = (x_ptr, addend_ptr, sum_ptr), (weight_ptr, bias_ptr)
    if SETS == 1:
        _rotate_row(
            source, norm, (x_int8_ptr, x_scale_ptr, x_columns_ptr), columns0_ptr, m, M, K, eps,
            NORM, ADDS, COLUMNS, ROOM, SIZE, RANDOM, EXACT, CHUNK, CHUNKS, EVEN_K,
        )  # fmt: skip
    else:
        columns_ptr = pick(set_number, columns0_ptr, columns1_ptr, columns2_ptr)
        number = tl.arange(0, ROOM)
        mine = tl.load(columns_ptr + number, mask=number < COLUMNS, other=0)
        first = tl.load(columns0_ptr + number, mask=number < COLUMNS, other=0)
        differs = tl.max((mine != first).to(tl.int32), 0)
        if m == 0:
            tl.store(sets_ptr + set_number, differs * set_number)
        if (set_number == 0) | (differs != 0):
            rows = set_number.to(tl.int64) * M
            results = (
                x_int8_ptr + rows * (tl.cdiv(K, SIZE) * SIZE),
                x_scale_ptr + rows,
                x_columns_ptr + rows * ROOM,
            )
            _rotate_row(
                source, norm, results, columns_ptr, m, M, K, eps,
                NORM, ADDS, COLUMNS, ROOM, SIZE, RANDOM, EXACT, CHUNK, CHUNKS, EVEN_K,
            )  # fmt: skip
