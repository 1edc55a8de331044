"""Integers of a few bits by groups of a rotated weight, and a few of its columns as they were."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels.formats.clip import quantize_groups, some_rows
from int8fx.kernels.formats.codes import codes_in_a_byte, pack_bits, unpack_bits
from int8fx.kernels.formats.format import CHANNEL, ROWS, Part, WeightFormat
from int8fx.kernels.formats.grouped import WHOLE, dequantize_codes, name_of, parts_of_zeros
from int8fx.kernels.formats.rotated import RotatedColumns, rotated_rows
from int8fx.kernels.ops.rotation import NONE, rotate_back, rotated_columns


@functools.cache
def rotated_groups(
    bits: int, group: int, zeros: str, block: int, rotation: str, columns: tuple[int, ...]
) -> WeightFormat:
    """The parts of ``grouped(bits, group, zeros)`` of the rotated weight, then ``columns [N, C]``.

    A product also takes ``turned [C, N]`` and ``which [C]`` int32, as of ``formats/rotated.py``.

    Args:
        columns: which stay as they are, ascending; they count as 0 in what is rotated.
    """

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach()
        at = _which(weight)
        pieces = [_quantize_rows(weight[rows], at) for rows in some_rows(weight)]
        codes, *others = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return (pack_bits(codes, bits), *others, weight.index_select(1, at.long()))

    def _quantize_rows(rows: Tensor, at: Tensor) -> list[Tensor]:
        rest = rows.float().index_fill(1, at.long(), 0)
        if rotation == NONE:
            return quantize_groups(rest, bits, group, zeros, rows.dtype)
        rotated, exponent = rotated_rows(rest, block, rotation)
        codes, scale, *rest_of_grid = quantize_groups(rotated, bits, group, zeros, rows.dtype)
        grown = [_grown(part, exponent) for part in (scale, *rest_of_grid[: zeros == "offset"])]
        return [codes, *grown, *rest_of_grid[len(grown) - 1 :]]

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        packed, *others, w_columns = stored
        how = bits, group, zeros, others, K, block, rotation
        w_hat = dequantize_rotated(unpack_bits(packed, bits), *how)
        return w_hat.index_copy(1, _which(packed).long(), w_columns.to(w_hat.dtype))

    def derive(stored: Sequence[Tensor], N: int, K: int) -> tuple[Tensor, Tensor]:
        return stored[-1].transpose(-1, -2).contiguous(), _which(stored[0])

    def _which(like: Tensor) -> Tensor:
        return torch.tensor(columns, dtype=torch.int32, device=like.device)

    padded = 1 if group == WHOLE else group
    of_codes = RotatedColumns("K", codes_in_a_byte(bits), padded, block, rotation)
    by_group = 1 if group == WHOLE else RotatedColumns("K", group, 1, block, rotation)
    turned = "" if rotation == NONE else f", rotated ({rotation}, blocks of {block})"
    in_float = f", columns {', '.join(map(str, columns))} as they are" if columns else ""
    return WeightFormat(
        name_of(bits, group, zeros) + turned + in_float,
        (
            Part("packed", torch.uint8, (ROWS, of_codes), of_all_columns=True),
            Part("scale", None, (ROWS, by_group)),
            *parts_of_zeros(zeros, by_group),
            Part("columns", None, (ROWS, len(columns))),
        ),
        quantize,
        dequantize,
        bits=bits,
        granularity=CHANNEL if group == WHOLE else group,
        zero_point=zeros in ("integer", "float"),
        family=f"{bits}-bit by groups",
        derived=(
            Part("turned", None, (len(columns), ROWS)),
            Part("which", torch.int32, (len(columns),)),
        ),
        derive=derive,
    )


def dequantize_rotated(
    codes: Tensor,
    bits: int,
    group: int,
    zeros: str,
    grid: Sequence[Tensor],
    K: int,
    block: int,
    rotation: str,
) -> Tensor:
    """ŵ ``[N, K]`` of the codes of its rotated rows; what is above the largest float becomes that."""
    columns = rotated_columns(K, block, rotation)
    if rotation == NONE:
        return dequantize_codes(codes, bits, group, zeros, grid, columns)
    # Of the largest floats, rotated rows are larger: they are made smaller by a power of 2.
    exponent = (grid[0].amax(1, keepdim=True).frexp().exponent - _LARGE).clamp_min(0)
    count = 2 if zeros == "offset" else 1
    smaller = [part.ldexp(-exponent) for part in grid[:count]]
    rest = dequantize_codes(codes, bits, group, zeros, [*smaller, *grid[count:]], columns)
    w_hat = _times_power(rotate_back(rest, K, block, rotation), exponent)
    largest = torch.finfo(w_hat.dtype).max
    return w_hat.clamp(-largest, largest)


_LARGE = 100  # of a scale's exponent


def _times_power(values: Tensor, exponent: Tensor) -> Tensor:
    """``values · 2**exponent``, where 2**exponent alone may be above the largest float."""
    half = exponent // 2
    return values.ldexp(half).ldexp(exponent - half)


def _grown(part: Tensor, exponent: Tensor) -> Tensor:
    """``part [N, G]`` of rows that were smaller by a power of 2, as its dtype holds it."""
    largest = torch.finfo(part.dtype).max
    return _times_power(part.float(), exponent.unsqueeze(1)).clamp(-largest, largest).to(part.dtype)
