"""Split K inside a kernel: programs that share a tile count themselves, and the last one adds up.

The grid is ``(tiles, SPLIT_K)``. The order of summation is fixed, whoever comes last, so a result is
the same bits every time. Nobody waits for a program that may not have started. Not on gfx9
(``configs.counts_parts``).
"""

import triton
import triton.language as tl

_STORED = tl.constexpr(256)


@triton.jit
def sum_of_tile(part_of_tile, part, parts_ptr, counters_ptr, SPLIT_K: tl.constexpr):
    """The sum of a small tile's parts, for the program that comes last; zeros for the others.

    Args:
        part_of_tile: ``[TOKENS, BLOCK_N]``, the part of this program.
        parts_ptr: ``[SPLIT_K, tiles, TOKENS, BLOCK_N]`` fp32, to work with.
        counters_ptr: ``[tiles]`` int32, zero; left zero, for whoever launches again with them.

    Returns:
        the sum, and whether this program came last.
    """
    TOKENS: tl.constexpr = part_of_tile.shape[0]
    BLOCK_N: tl.constexpr = part_of_tile.shape[1]
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    within = tl.arange(0, TOKENS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    here = parts_ptr + tile * TOKENS * BLOCK_N + within
    distance = tiles * TOKENS * BLOCK_N
    tl.store(here + part * distance, part_of_tile)
    tl.debug_barrier()  # the count below says that all threads have stored
    counter = counters_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tile
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1
    total = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for index in tl.static_range(SPLIT_K):
        total += tl.load(here + index * distance, mask=is_last, other=0.0)
    tl.store(counter, 0, mask=is_last)
    return total, is_last


@triton.jit
def sum_of_large_tile(part_of_tile, part, parts_ptr, counters_ptr, SPLIT_K: tl.constexpr):
    """The same for a tile that fills the registers: it is stored, and summed, in pieces.

    Of two parts, whose sum has no order, who comes first stores and who comes last adds: half the
    traffic. Who comes last waits for a program that has nothing left to do but to store.

    Args:
        part_of_tile: in fp32, or int32, whose sum is exact.
        parts_ptr: as above, of its dtype; of two parts, one is stored.

    Returns:
        the sum, anything for the others; and whether this program came last.
    """
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    size: tl.constexpr = part_of_tile.shape[0] * part_of_tile.shape[1]
    PIECES: tl.constexpr = (part_of_tile.shape[1] + 63) // 64
    here = parts_ptr + tile * size
    distance = tiles * size
    counter = counters_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tile
    # Every piece ends in a barrier: the count after it says that all threads have stored.
    if SPLIT_K == 2:
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") % _STORED == 1
        _store_pieces(part_of_tile, here, not is_last, PIECES)
        if is_last:
            while tl.atomic_add(counter, 0, sem="acquire") < _STORED:
                pass
        else:
            tl.atomic_add(counter, _STORED, sem="release")
    else:
        _store_pieces(part_of_tile, here + part * distance, True, PIECES)
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1
    tl.store(counter, 0, mask=is_last)
    total = _sum_of_pieces(part_of_tile, part, here, distance, is_last, SPLIT_K, PIECES)
    return total, is_last


@triton.jit
def halves(tile):
    """Its left and its right columns."""
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _places(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Given a tile, torch would take whatever it was computed from for written to, the weight as well.
    return pointer + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _store_pieces(tile, pointer, mask, PIECES: tl.constexpr):
    """Stores a tile, one piece after another."""
    if PIECES == 1:
        tl.store(_places(pointer, tile.shape[0], tile.shape[1]), tile, mask=mask)
        tl.debug_barrier()
    else:
        left, right = halves(tile)
        size: tl.constexpr = left.shape[0] * left.shape[1]
        _store_pieces(left, pointer, mask, PIECES // 2)
        _store_pieces(right, pointer + size, mask, PIECES // 2)


@triton.jit
def _sum_of_pieces(
    tile, part, pointer, distance, is_last, SPLIT_K: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """The sum of this part and of those that ``_store_pieces`` stored, one piece after another."""
    if PIECES == 1:
        places = _places(pointer, tile.shape[0], tile.shape[1])
        if SPLIT_K == 2:
            total = tile + tl.load(places, mask=is_last, other=0.0)
        else:
            total = tl.zeros(tile.shape, tile.dtype)
            for index in range(SPLIT_K):  # unrolled, all of them would be in registers at once
                wanted = is_last & (index != part)
                other = tl.load(places + index * distance, mask=wanted, other=0.0)
                total += tl.where(index == part, tile, other)
        tl.debug_barrier()
        return total
    else:
        left, right = halves(tile)
        size: tl.constexpr = left.shape[0] * left.shape[1]
        left = _sum_of_pieces(left, part, pointer, distance, is_last, SPLIT_K, PIECES // 2)
        right = _sum_of_pieces(right, part, pointer + size, distance, is_last, SPLIT_K, PIECES // 2)
        both = tl.permute(tl.join(left, right), (0, 2, 1))
        return tl.reshape(both, (tile.shape[0], tile.shape[1]))
