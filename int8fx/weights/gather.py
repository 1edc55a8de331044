"""What FSDP2 exchanges of a quantised weight, and how parts become the whole: see ``sharding.py``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from int8fx.kernels.formats.int8 import PER_CHANNEL

SCALE_BYTES = torch.float32.itemsize
# The parts of what may be cut along either axis, into pieces of any length.
CUT_ANYWHERE = PER_CHANNEL.parts


@dataclass(frozen=True)
class Cut:
    """How a parameter is spread over the processes.

    Attributes:
        size: of the whole parameter.
        dimension: that it is cut along.
        ranks: how many processes there are.
        transposed: whether the parameter is the matrix's transpose.
        parts_apart: whether each part of the format goes by itself, whatever it is.
    """

    size: tuple[int, ...]
    dimension: int
    ranks: int
    transposed: bool
    parts_apart: bool

    @classmethod
    def of(cls, part: Any, ranks: int, size: Sequence[int]) -> "Cut":
        dimension = 0 if part.shape[1] == size[1] else 1
        anywhere = part.weight_format.parts == CUT_ANYWHERE
        return cls(tuple(size), dimension, ranks, part.transposed, not anywhere)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(N, K)`` of the whole."""
        N, K = self.size[:: -1 if self.transposed else 1]
        return N, K

    @property
    def length(self) -> int:
        """Of the longest part, along the dimension."""
        return -(-self.size[self.dimension] // self.ranks)

    @property
    def rows(self) -> bool:
        """Whether the parts are rows of ``w_int8``."""
        return (self.dimension == 0) is not self.transposed

    @property
    def scales_apart(self) -> bool:
        """Whether scales may go as what they are, a vector."""
        return self.dimension == 0 and self.size[0] % self.ranks == 0

    @property
    def parts(self) -> int:
        """How many processes hold any of it."""
        return -(-self.size[self.dimension] // self.length)

    def turned(self, matrix: Tensor) -> Tensor:
        """From the shape of ``w_int8`` to that of the parameter; and back."""
        return matrix.t() if self.transposed else matrix


def to_gather(part: Any, cut: Cut) -> tuple[Tensor, ...]:
    """What a process gives.

    Raises:
        RuntimeError: there is no room for the scales, or the format goes in equal rows only.
    """
    if cut.parts_apart:
        return _rows_of_each_part(part, cut)
    w_int8 = part.w_int8
    if cut.scales_apart:
        return cut.turned(w_int8).contiguous(), part.w_scale
    missing = cut.length - part.shape[cut.dimension]
    w_int8 = pad(w_int8, (0, 0, 0, missing) if cut.rows else (0, missing))
    scales = torch.zeros_like(w_int8)
    if w_int8.shape[1] < SCALE_BYTES:
        raise RuntimeError(
            f"FSDP2 cannot cut an int8 weight of shape {list(cut.size)} into parts of {cut.length} "
            f"along dimension {cut.dimension}: {w_int8.shape[1]} columns leave no room for a scale "
            f"({SCALE_BYTES} bytes); leave it in float (skip)"
        )
    scales[: part.w_scale.shape[0], :SCALE_BYTES] = part.w_scale.unsqueeze(1).view(torch.int8)
    return cut.turned(w_int8).contiguous(), cut.turned(scales).contiguous()


def _rows_of_each_part(part: Any, cut: Cut) -> tuple[Tensor, ...]:
    by_rows = all(each.dim_of("N") == 0 for each in part.weight_format.parts)
    if not (cut.rows and cut.scales_apart and by_rows):
        raise RuntimeError(
            f"FSDP2 cannot cut a weight of shape {list(cut.size)}, {part.weight_format.name}, into "
            f"{cut.ranks} parts along dimension {cut.dimension}: allowed are equal numbers of rows; "
            "leave it in float (skip)"
        )
    # FSDP2 cannot hand on what has no elements, as the weights of no columns.
    return tuple(tensor.contiguous() for tensor in part.stored() if tensor.numel())


def with_empty_parts(part: Any, outputs: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    """The stored parts of the whole, those without elements among them; ``part`` is a process's."""
    weight_format, given = part.weight_format, iter(outputs)
    return [
        torch.empty(shape, dtype=each.dtype or part.dtype, device=part.device)
        if 0 in shape
        else next(given)
        for shape, each in zip(weight_format.shapes(*cut.matrix), weight_format.parts, strict=True)
    ]


def gathered(outputs: Sequence[Tensor], cut: Cut) -> Sequence[Tensor]:
    """The stored parts of the whole, of what all processes gave.

    Raises:
        RuntimeError: columns of one row came with different scales.
    """
    if cut.parts_apart:
        return outputs
    values, scales = outputs
    if cut.dimension == 1:
        # FSDP2 hands memory of the shape of the whole on in the shape of the parts.
        shape = (cut.size[0], values.numel() // cut.size[0])
        values, scales = values.view(shape), scales.view(shape)
    w_int8 = cut.turned(values)
    if not cut.scales_apart:
        # [N, 4] of each part; of parts of rows, one after another.
        each = w_int8.shape[1] if cut.rows else cut.length
        first = cut.turned(scales).unflatten(1, (-1, each))[:, :, :SCALE_BYTES]
        scales = first.transpose(0, 1).contiguous().view(torch.float32)
    N, K = cut.size[:: -1 if cut.transposed else 1]
    w_int8 = w_int8[:N, :K].contiguous()
    if cut.rows:
        return w_int8, scales.flatten()[:N]
    of_parts = scales.view(-1, N)[: cut.parts]
    if not torch.equal(of_parts, of_parts[:1].expand_as(of_parts)):
        raise RuntimeError(
            f"each process quantised its columns of a weight of shape {list(cut.size)} with scales of "
            "its own, which cannot be put together: int8fx.quantize_(model) comes before fully_shard"
        )
    return w_int8, of_parts[0]
