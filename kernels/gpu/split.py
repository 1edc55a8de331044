"""Split K inside a kernel: programs that share a tile count themselves, and the last one adds up.

The grid is ``(tiles, SPLIT_K)``. The order of summation is fixed, whoever comes last, so a result is
the same bits every time. Nobody waits for a program that may not have started.
"""

import triton
import triton.language as tl

_STORED = tl.constexpr(256)


@triton.jit
def sum_of_tile(part_of_tile, part, parts_ptr, counters_ptr, SPLIT_K: tl.constexpr):
    """The sum of a tile's parts, for the program that comes last; anything for the others.

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
    for index in range(SPLIT_K):  # a loop: unrolled, all parts would be in registers at once
        other = tl.load(here + index * distance, mask=is_last & (index != part), other=0.0)
        total += tl.where(index == part, part_of_tile, other)
    tl.store(counter, 0, mask=is_last)
    return total, is_last


@triton.jit
def sum_of_two(part_of_tile, parts_ptr, counters_ptr):
    """The same of two parts, whose sum has no order: who comes first stores, who comes last adds.

    A tile of 128 x 256 leaves no registers for a sum beside the part, nor for all of the other at once,
    which is stored and read in pieces; and this is half the traffic. Who comes last waits for a program
    that has nothing left to do but to store.

    Args:
        parts_ptr: fp32 of the tiles' size, to work with.
    """
    tile = tl.program_id(0)
    size: tl.constexpr = part_of_tile.shape[0] * part_of_tile.shape[1]
    PIECES: tl.constexpr = (part_of_tile.shape[1] + 63) // 64
    here = parts_ptr + tile * size
    counter = counters_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tile
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") % _STORED == 1
    # Every piece ends in a barrier: the count below says that all threads have stored.
    _store_pieces(part_of_tile, here, not is_last, PIECES)
    if is_last:
        while tl.atomic_add(counter, 0, sem="acquire") < _STORED:
            pass
        tl.store(counter, 0)
    else:
        tl.atomic_add(counter, _STORED, sem="release")
    return _plus_pieces(part_of_tile, here, is_last, PIECES), is_last


@triton.jit
def _halves(tile):
    """Its left and its right columns."""
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _places(pointer, tile):
    row, column = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    return pointer + row * tile.shape[1] + column


@triton.jit
def _store_pieces(tile, pointer, mask, PIECES: tl.constexpr):
    """Stores a tile, one piece after another."""
    if PIECES == 1:
        tl.store(_places(pointer, tile), tile, mask=mask)
        tl.debug_barrier()
    else:
        left, right = _halves(tile)
        size: tl.constexpr = left.shape[0] * left.shape[1]
        _store_pieces(left, pointer, mask, PIECES // 2)
        _store_pieces(right, pointer + size, mask, PIECES // 2)


@triton.jit
def _plus_pieces(tile, pointer, mask, PIECES: tl.constexpr):
    """The tile plus one that ``_store_pieces`` stored, one piece after another."""
    if PIECES == 1:
        other = tl.load(_places(pointer, tile), mask=mask, other=0.0)
        tl.debug_barrier()
        return tile + other
    else:
        left, right = _halves(tile)
        size: tl.constexpr = left.shape[0] * left.shape[1]
        left = _plus_pieces(left, pointer, mask, PIECES // 2)
        right = _plus_pieces(right, pointer + size, mask, PIECES // 2)
        both = tl.permute(tl.join(left, right), (0, 2, 1))
        return tl.reshape(both, (tile.shape[0], tile.shape[1]))
