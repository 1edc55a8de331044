"""Integers of a few bits by groups of rows: HQQ's ``axis=0``.

    ŵ[n, k] = (code[n, k] - zero[g, k]) · scale[g, k]   in fp32,    g = n mod ⌈N / group⌉

A group is ``group`` weights of one column, whose rows are ``⌈N / group⌉`` apart. Zero points are as in
``kernels/formats/grouped.py``. A weight is cut neither along N nor along K, but as a whole.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.clip import quantize_groups
from int8fx.kernels.formats.codes import codes_in_a_byte, pack_bits, unpack_bits
from int8fx.kernels.formats.format import COLUMNS, ROWS, Axis, Part, WeightFormat
from int8fx.kernels.formats.grouped import WHOLE, dequantize_codes, name_of, parts_of_zeros


@dataclass(frozen=True)
class RowGroups(Axis):
    """Groups of rows that lie apart: no piece of the rows has groups of its own."""

    @property
    def step(self) -> int:
        return 0

    def length(self, size: int) -> int:
        return -(-size // self.divisor)


@functools.cache
def row_groups(bits: int, group: int, zeros: str = "float") -> WeightFormat:
    """``packed [N, bytes]`` uint8, ``scale [G, K]``, then zero points or offsets ``[G, K]``."""

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach()
        N, K = weight.shape
        groups = -(-N // group)
        columns = _by_column(F.pad(weight, (0, 0, 0, groups * group - N)), groups)
        codes, *others = quantize_groups(columns, bits, WHOLE, zeros, weight.dtype)
        rows = _by_row(codes, groups, K)[:N]
        return (pack_bits(rows, bits), *(part.view(groups, K) for part in others))

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        packed, *others = stored
        groups = len(others[0])
        codes = F.pad(unpack_bits(packed, bits)[:, :K], (0, 0, 0, groups * group - N))
        others = [part.reshape(-1, 1) for part in others]
        columns = dequantize_codes(_by_column(codes, groups), bits, WHOLE, zeros, others, group)
        return _by_row(columns, groups, K)[:N].contiguous()

    by_group = RowGroups("N", group)
    zero_parts = (Part(part.name, part.dtype, (by_group, COLUMNS)) for part in parts_of_zeros(zeros, 1))
    return WeightFormat(
        name_of(bits, group, zeros).replace("by groups of", "by rows, groups of"),
        (
            Part("packed", torch.uint8, (ROWS, Axis("K", codes_in_a_byte(bits)))),
            Part("scale", None, (by_group, COLUMNS)),
            *zero_parts,
        ),
        quantize,
        dequantize,
        bits=bits,
        granularity=f"{group} rows",
        zero_point=zeros in ("integer", "float"),
        family=f"{bits}-bit by groups of rows",
    )


def _by_column(rows: Tensor, groups: int) -> Tensor:
    """``[group · groups, K]`` to ``[groups · K, group]``: a row for each group."""
    return rows.unflatten(0, (-1, groups)).permute(1, 2, 0).reshape(-1, len(rows) // groups)


def _by_row(columns: Tensor, groups: int, K: int) -> Tensor:
    """The inverse."""
    return columns.view(groups, K, -1).permute(2, 0, 1).reshape(-1, K)


def from_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, ...]:
    """The stored parts of codes ``[N, K]`` uint8, with scales and zero points ``[G, K]``."""
    others = [part.contiguous() for part in (scale, zero_point) if part is not None]
    return (pack_bits(codes.contiguous(), bits), *others)
