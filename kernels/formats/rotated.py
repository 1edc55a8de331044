"""Int8 of a rotated weight, and a few of its columns as they were."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.kernels.formats.format import ROWS, Axis, Part, WeightFormat
from int8fx.kernels.formats.int8 import FAMILY, SCALE
from int8fx.kernels.ops.quantize_reference import quantize_weight, weight_scale
from int8fx.kernels.ops.rotated_linear import dequantize_rotated
from int8fx.kernels.ops.rotation import NONE, rotate_weight, rotated_columns

_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class RotatedColumns(Axis):
    """K as it is after the rotation, which pads it where no block divides it.

    A piece of K may have blocks of another size, so K is not cut (``Part.of_all_columns``).
    """

    block: int = 64
    rotation: str = "hadamard"

    def length(self, size: int) -> int:
        return super().length(rotated_columns(size, self.block, self.rotation))


@functools.cache
def rotated(block: int, rotation: str, columns: tuple[int, ...]) -> WeightFormat:
    """``int8 [N, rotated_columns(K)]``, ``scale [N]`` fp32, ``columns [N, C]`` in the weight's dtype.

    A product also takes the columns as rows, ``turned [C, N]``, and ``which [C]`` int32: their numbers,
    which the scheme's settings have.

    Args:
        columns: which stay as they are, ascending; they count as 0 in what is rotated.
    """

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach()
        w_int8, w_scale = quantize_rotated(weight, _which(weight), block, rotation)
        return w_int8, w_scale, weight.index_select(1, _which(weight).long())

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        w_int8, w_scale, w_columns = stored
        at = _which(w_int8)
        return dequantize_rotated(w_int8, w_scale, w_columns.t(), at, K, block, rotation)

    def derive(stored: Sequence[Tensor], N: int, K: int) -> tuple[Tensor, Tensor]:
        return stored[2].transpose(-1, -2).contiguous(), _which(stored[0])

    def _which(like: Tensor) -> Tensor:
        return torch.tensor(columns, dtype=torch.int32, device=like.device)

    numbers = ", ".join(map(str, columns))
    in_float = f", columns {numbers} as they are" if columns else ""
    turned = "" if rotation == NONE else f", rotated ({rotation}, blocks of {block})"
    return WeightFormat(
        f"int8 per channel{turned or ' without columns'}{in_float}",
        (
            Part("int8", torch.int8, (ROWS, RotatedColumns("K", block=block, rotation=rotation)), True),
            SCALE,
            Part("columns", None, (ROWS, len(columns))),
        ),
        quantize,
        dequantize,
        family=FAMILY,
        derived=(
            Part("turned", None, (len(columns), ROWS)),
            Part("which", torch.int32, (len(columns),)),
        ),
        derive=derive,
    )


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1)


def quantize_rotated(
    weight: Tensor,
    columns: Tensor,
    block: int,
    rotation: str,
    largest: Callable[[Tensor], Tensor] = _largest,
) -> tuple[Tensor, Tensor]:
    """``w_int8 [N, rotated_columns(K)]`` and ``w_scale [N]`` fp32 of ``weight [N, K]``.

    Args:
        largest: ``max |rows|`` of each of the rows that it is given, ``[*]``; of more columns than
            these where several processes have them.
    """
    N, K = weight.shape
    w_int8 = weight.new_empty(N, rotated_columns(K, block, rotation), dtype=torch.int8)
    w_scale = weight.new_empty(N, dtype=torch.float32)
    for part in _parts(weight):
        rest = weight[part].to(torch.float32).index_fill(1, columns.long(), 0)
        if rotation == NONE:
            w_int8[part], w_scale[part] = quantize_weight(rest)
            continue
        rest, exponent = rotated_rows(rest, block, rotation, largest)
        scale = weight_scale(largest(rest).unsqueeze(1))
        w_int8[part] = torch.round(rest / scale.unsqueeze(1)).to(torch.int8)
        w_scale[part] = scale.ldexp(exponent)
    return w_int8, w_scale


def rotated_rows(
    rows: Tensor, block: int, rotation: str, largest: Callable[[Tensor], Tensor] = _largest
) -> tuple[Tensor, Tensor]:
    """``rows [N, K]`` rotated, and the power of 2 ``[N]`` that each of the rotated is smaller by.

    Sums of the largest floats would be infinite.
    """
    exponent = largest(rows).frexp().exponent.clamp_min(0)
    return rotate_weight(rows.ldexp(-exponent.unsqueeze(1)), block, rotation), exponent


def _parts(rows: Tensor) -> Iterator[slice]:
    """Some rows at a time: a large weight in fp32, several times over, is what a peak is made of."""
    step = max(1, _ELEMENTS_AT_ONCE // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
