"""How 4-bit codes are packed for the CPU's products of ``ops/grouped_linear.py``.

Packed ``[ceil(N / NR), K_padded · NR / 2]`` uint8, K_padded the stored codes rounded up to 8: for each
micro-panel of NR channels ``[K_padded / 8][NR][4]``. Byte i of the four has code k + i in its low half
and code k + 4 + i in its high half, so that a mask and a shift give two operands of vpdpbusd.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from int8fx.kernels.cpu import pages
from int8fx.kernels.cpu.int8_linear import NR

BYTES_AT_ONCE = 4  # of stored codes


def packed_shape(N: int, stored: int) -> tuple[int, int]:
    """Of the layout above, for stored codes ``[N, stored]``, two in a byte."""
    return -(-N // NR), -(-stored // BYTES_AT_ONCE) * BYTES_AT_ONCE * NR


def pack(codes: Tensor) -> Tensor:
    """Stored codes ``[N, bytes]`` uint8 in the layout above."""
    N, stored = codes.shape
    padded = F.pad(codes, (0, -stored % BYTES_AT_ONCE, 0, -N % NR)).unflatten(1, (-1, BYTES_AT_ONCE))
    packed = pages.empty(*packed_shape(N, stored)).view(torch.uint8)
    # Codes 0 and 1 of a stored byte, of the first four of eight codes and of the last four.
    quads = packed.view(-1, padded.shape[1], NR, BYTES_AT_ONCE)
    first, last = (padded[:, :, half].unflatten(0, (-1, NR)).transpose(1, 2) for half in _HALVES)
    quads[..., 0::2] = first & 15 | last << 4
    quads[..., 1::2] = first >> 4 | last & 0xF0
    return packed


_HALVES = (slice(0, 2), slice(2, 4))


def unpack(packed: Tensor, N: int, stored: int) -> Tensor:
    """The stored codes ``[N, stored]`` that were packed."""
    quads = packed.view(packed.shape[0], -1, NR, BYTES_AT_ONCE)
    even, odd = quads[..., 0::2], quads[..., 1::2]
    codes = torch.cat([even & 15 | odd << 4, even >> 4 | odd & 0xF0], -1)
    return codes.transpose(1, 2).flatten(0, 1).flatten(1)[:N, :stored].contiguous()
