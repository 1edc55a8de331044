"""Int8 of a rotated weight, and a few of its columns as they were."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.kernels.ops.rotated_linear import dequantize_rotated
from int8fx.kernels.ops.rotation import rotate_weight, rotated_columns

_ELEMENTS_AT_ONCE = 2**20


@functools.cache
def rotated(block: int, rotation: str, columns: tuple[int, ...]) -> WeightFormat:
    """``w_int8 [N, rotated_columns(K)]`` packed for the device, ``w_scale [N]`` fp32, ``columns [C]``
    int32 and ``w_columns [C, N]`` in the weight's dtype.

    Of experts ``[E, N, K]`` all but ``columns`` have a first dimension E.

    Args:
        columns: which stay as they are, ascending; they count as 0 in what is rotated.
    """

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach()
        at = torch.tensor(columns, dtype=torch.int32, device=weight.device)
        w_columns = weight.index_select(-1, at.long()).transpose(-1, -2).contiguous()
        w_int8, w_scale = quantize_rotated_weight(weight, at, block, rotation)
        return table.pack(w_int8), w_scale, at, w_columns

    def dequantize(tensors: Sequence[Tensor], N: int, K: int) -> Tensor:
        packed, w_scale, at, w_columns = tensors
        w_int8 = table.unpack(packed, N, rotated_columns(K, block, rotation))
        return dequantize_rotated(w_int8, w_scale, at, w_columns, K, block, rotation)

    kept = "".join(f" {k}" for k in columns)
    name = f"int8, rotated by {rotation} in blocks of {block}, but columns{kept or ' none'}"
    return WeightFormat(name, ("int8", "scale", "columns", "of_columns"), quantize, dequantize)


def quantize_rotated_weight(
    weight: Tensor, columns: Tensor, block: int, rotation: str
) -> tuple[Tensor, Tensor]:
    """``w_int8 [*, N, rotated_columns(K)]`` and ``w_scale [*, N]`` of ``weight [*, N, K]``."""
    rows = weight.reshape(-1, weight.shape[-1])
    w_int8 = rows.new_empty(
        len(rows), rotated_columns(rows.shape[1], block, rotation), dtype=torch.int8
    )
    w_scale = rows.new_empty(len(rows), dtype=torch.float32)
    for part in _parts(rows):
        rest = rows[part].to(torch.float32).index_fill(1, columns.long(), 0)
        w_int8[part], w_scale[part] = quantize_weight(rotate_weight(rest, block, rotation))
    shape = weight.shape[:-1]
    return w_int8.view(*shape, -1), w_scale.view(shape)


def _parts(rows: Tensor) -> Iterator[slice]:
    """Some rows at a time: a large weight in fp32, several times over, is what a peak is made of."""
    step = max(1, _ELEMENTS_AT_ONCE // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))
