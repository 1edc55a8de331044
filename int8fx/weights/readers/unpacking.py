"""Integers of a few bits out of words and bytes.

Most layouts are one stream of bits, low bits first: integer ``i`` has the bits from ``i · bits`` on,
also where these cross the border of two words. ``bits`` bytes of such a stream hold 8 integers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Integers that are unpacked, or packed, together: a few rows, so that little memory comes on top.
AT_ONCE = 2**19


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Some rows at a time, of ``AT_ONCE`` elements."""
    step = max(1, AT_ONCE // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of each row: ``[R, count]`` uint8.

    Args:
        words: ``[R, W]`` of any integer dtype, little-endian.
        bits: 1 to 8.
    """
    found = torch.empty(len(words), count, dtype=torch.uint8, device=words.device)
    for rows in row_blocks(len(words), count):
        found[rows] = _unpacked(words[rows], bits)[:, :count]
    return found


def _unpacked(words: Tensor, bits: int) -> Tensor:
    # Of one column any stride counts as contiguous, and only one of 1 can be seen as bytes.
    stream = words.contiguous().flatten().view(torch.uint8).view(len(words), -1)
    missing = -stream.shape[-1] % bits
    if missing:
        stream = torch.nn.functional.pad(stream, (0, missing))
    octets = stream.unflatten(-1, (-1, bits))
    return torch.stack([_integer(octets, i * bits, bits) for i in range(8)], -1).flatten(-2)


def _integer(octets: Tensor, start: int, bits: int) -> Tensor:
    byte, shift = divmod(start, 8)
    value = octets[..., byte] >> shift
    if shift + bits > 8:
        value = value | octets[..., byte + 1] << (8 - shift)
    return value & ((1 << bits) - 1)


def pack(integers: Tensor, bits: int) -> Tensor:
    """The inverse: ``[R, C]`` uint8 to ``[R, words_for(C, bits)]`` int32."""
    rows, count = integers.shape
    words = words_for(count, bits)
    octets = torch.nn.functional.pad(integers, (0, -count % 8)).unflatten(-1, (-1, 8))
    stream = octets.new_zeros(rows, octets.shape[1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= octets[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= octets[..., i] >> (8 - shift)
    found = torch.nn.functional.pad(stream.flatten(1), (0, 4 * words))[:, : 4 * words]
    return found.contiguous().flatten().view(torch.int32).view(rows, words)


def words_for(count: int, bits: int, word_bits: int = 32) -> int:
    """How many words hold ``count`` integers."""
    return -(-count * bits // word_bits)


def halves(packed: Tensor, parts: int) -> Tensor:
    """Integers that a byte holds of rows far apart: ``[R, C]`` to ``[parts · R, C]``, the first rows in
    the high bits."""
    bits = 8 // parts
    rows = [packed >> (8 - bits * (i + 1)) & ((1 << bits) - 1) for i in range(parts)]
    return torch.cat(rows, 0)
