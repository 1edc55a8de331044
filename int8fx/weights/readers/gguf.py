"""GGUF's blocks of quantised weights, kept as integers with scales.

    Q8_0   32 weights: fp16 d, 32 int8                               ŵ = d · q
    Q4_0   32: fp16 d, 16 bytes, low nibbles first                   ŵ = d · (q - 8)
    Q4_1   32: fp16 d, fp16 m, 16 bytes                              ŵ = d · q + m
    Q4_K   256: fp16 d, fp16 dmin, 12 bytes of 8 scales and 8 minima of 6 bits, 128 bytes, of 64 weights
           32 in the low nibbles and 32 in the high                  ŵ = (d · s) · q - dmin · m
    Q6_K   256: 128 bytes of low nibbles, 64 of two high bits, 16 int8 scales, fp16 d
                                                                     ŵ = (d · s) · (q - 32)

The weight of a module is its rows of blocks, ``[N, bytes]`` uint8. Source: ggml's ``ggml-common.h``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config

TYPE = "type"  # what a module's metadata names its blocks by


@dataclass(frozen=True)
class Block:
    weights: int
    bytes: int


BLOCKS = {
    "Q4_0": Block(32, 18),
    "Q4_1": Block(32, 20),
    "Q8_0": Block(32, 34),
    "Q4_K": Block(256, 144),
    "Q6_K": Block(256, 210),
}


def settings(config: Config) -> None:
    """The file has a type for each tensor."""


def read(module: StoredModule, settings: None) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    kind = module.metadata[TYPE]
    if kind not in BLOCKS:
        raise module.error("weight", f"blocks of {kind}; read: {', '.join(BLOCKS)}")
    block = BLOCKS[kind]
    rows = module.take("weight", torch.uint8, None, None)
    if rows.shape[1] % block.bytes:
        raise module.error("weight", f"rows of {rows.shape[1]} bytes, no multiple of {block.bytes}")
    found = _READ[kind](rows.unflatten(1, (-1, block.bytes)))
    if not found.scale.isfinite().all() or (
        found.offset is not None and not found.offset.isfinite().all()
    ):
        raise module.error("weight", "corrupt: a scale that is not finite")
    return found


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte of each block: ``[N, B]``."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(stored: Tensor) -> Tensor:
    """Of each last dimension the low nibbles, and then the high ones."""
    return torch.cat([stored & 15, stored >> 4], -1)


def _q8_0(blocks: Tensor) -> Grouped:
    codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
    return Grouped(codes, _half(blocks, 0), 32, 8)


def _q4_0(blocks: Tensor) -> Grouped:
    scale = _half(blocks, 0)
    eight = torch.full(scale.shape, 8, dtype=torch.uint8, device=scale.device)
    return Grouped(_nibbles(blocks[..., 2:]).flatten(1), scale, 32, 4, zero_point=eight)


def _q4_1(blocks: Tensor) -> Grouped:
    codes = _nibbles(blocks[..., 4:]).flatten(1)
    return Grouped(codes, _half(blocks, 0), 32, 4, offset=_half(blocks, 2))


def _q4_k(blocks: Tensor) -> Grouped:
    d, dmin = _half(blocks, 0).float().unsqueeze(-1), _half(blocks, 2).float().unsqueeze(-1)
    scales, minima = _six_bits(blocks[..., 4:16])
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(1)
    return Grouped(
        codes, (d * scales.float()).flatten(1), 32, 4, offset=-(dmin * minima.float()).flatten(1)
    )


def _six_bits(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of twelve bytes: the first four of each in the low bits of four
    bytes, whose two high bits belong to the last four, as do the nibbles of the last four bytes."""
    first, second, third = stored.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], -1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], -1)
    return scales, minima


def _q6_k(blocks: Tensor) -> Grouped:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (4, 32))
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -2)
    codes = (low | high << 4).view(torch.int8) - 32
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    d = _half(blocks, 208).float().unsqueeze(-1)
    return Grouped(codes.flatten(1), (d * scales.float()).flatten(1), 16, 6)


_READ = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
