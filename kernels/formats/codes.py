"""Integers of a few bits in bytes: as many in a byte as divide it, the first in its lowest bits.

| bits | in a byte |
|---|---|
| 1, 2, 4 | 8, 4, 2 |
| 3, 5, 6, 7, 8 | 1 |
"""

import torch
from torch import Tensor


def codes_in_a_byte(bits: int) -> int:
    return 8 // bits if 8 % bits == 0 else 1


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """``codes [*, K]`` uint8, each below ``2**bits``, to ``[*, ceil(K / codes_in_a_byte)]`` uint8."""
    count = codes_in_a_byte(bits)
    if count == 1:
        return codes.contiguous()
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count))
    packed = padded[..., ::count].clone()
    for index in range(1, count):
        packed |= padded[..., index::count] << (index * bits)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The codes, ``[*, bytes · codes_in_a_byte]`` uint8."""
    count = codes_in_a_byte(bits)
    if count == 1:
        return packed
    shifted = [packed >> (index * bits) & (1 << bits) - 1 for index in range(count)]
    return torch.stack(shifted, -1).flatten(-2)
