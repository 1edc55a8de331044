"""How 4-bit codes are packed for a GPU's products of weights by groups.

Packed ``[N · W / 16, 16]`` uint8, W the bytes of a row: 32 for each 64 codes, of which K is padded to a
multiple. Byte i of the 32 has code i in its low half and code 32 + i in its high half: a mask and a
shift give two tiles of neighbouring columns, which need no exchange between threads to be operands of a
product. Every row starts aligned.

The shape is none that the stored codes ``[N, bytes]`` may have, so that it says how they lie.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.codes import pack_bits, unpack_bits

RUN = 32  # neighbouring codes in the low halves of bytes, and in the high halves
_ROW = 16  # bytes of a vector load


def row_bytes(stored: int) -> int:
    """W, of so many stored bytes of two codes."""
    return -(-stored // RUN) * RUN


def packed_shape(N: int, stored: int) -> tuple[int, int]:
    """Of the layout above, for stored codes ``[N, stored]``, two in a byte."""
    return N * row_bytes(stored) // _ROW, _ROW


def pack(codes: Tensor) -> Tensor:
    """Stored codes ``[N, bytes]`` uint8 in the layout above."""
    N, stored = codes.shape
    padded = unpack_bits(F.pad(codes, (0, row_bytes(stored) - stored)), 4)
    low, high = padded.unflatten(1, (-1, 2, RUN)).unbind(2)
    return (low | high << 4).reshape(packed_shape(N, stored))


def unpack(packed: Tensor, N: int, stored: int) -> Tensor:
    """The stored codes ``[N, stored]`` that were packed."""
    runs = packed.reshape(N, -1, RUN)
    codes = torch.stack([runs & 15, runs >> 4], 2).flatten(1)
    return pack_bits(codes, 4)[:, :stored].contiguous()
