"""Rotated weights whose columns are divided among processes: the bits that one process alone has.

    w_scale = max over processes of |rotate_weight(w)| / 127
    x_scale = max over processes of |rotate(x)| / 127
    acc     = Σ over processes of x_int8 @ w_int8ᵀ            integers: the sum is exact
    y       = acc · x_scale · w_scale + bias                  in the first process, 0 in the others

``RowwiseParallel`` gives each process some columns of a weight and of x, and adds up what they return.
A scale of each process's own would make results depend on how many there are. The sum of y and zeros
does not. That takes two more exchanges: of a number for each row, and of the integers.

It holds where each process has as many whole blocks of columns, and no static columns. Elsewhere each
process has scales of its own, as in the other schemes.
"""

from typing import Any

import torch
from torch import Tensor

from int8fx import torch_private
from int8fx.kernels import packing
from int8fx.kernels.formats.rotated import quantize_rotated
from int8fx.kernels.ops.int8_linear import int8_linear
from int8fx.kernels.ops.quantize_reference import MIN_SCALE, QMAX
from int8fx.kernels.ops.rotation import block_of, rotate
from int8fx.kernels.schemes.rotated import Rotation
from int8fx.kernels.schemes.scheme import Choice
from int8fx.weights.distributed import is_distributed
from int8fx.weights.tensor import QuantizedWeight

_EXACT = 2**24  # below which fp32 has every integer
_DIGIT = 16  # an int8 value is 16 times a digit of at most 8, and another one
_MOST_COLUMNS = _EXACT // (8 * QMAX) - 1  # of a process


def group_of(weight: Tensor, choice: Choice, transposed: bool) -> str:
    """The name of the group of processes that have its columns in whole blocks; or empty."""
    settings = choice.settings
    if not is_distributed(weight) or weight.is_meta or not isinstance(settings, Rotation):
        return ""
    dim: Any = 0 if transposed else 1
    divided = [i for i, placed in enumerate(weight.placements) if placed.is_shard(dim)]  # type: ignore[attr-defined]
    if len(divided) != 1 or settings.columns:
        return ""
    mesh, K = weight.device_mesh, weight.shape[dim]  # type: ignore[attr-defined]
    size = block_of(K, settings.block, settings.rotation)
    among = mesh.size(divided[0])
    if K % (among * size) or K // among > _MOST_COLUMNS:
        return ""
    return mesh.get_group(divided[0]).group_name


def quantized(part: Tensor, choice: Choice, transposed: bool, group: str) -> QuantizedWeight:
    """This process's columns, with the scales of all."""
    settings: Rotation = choice.settings
    matrix = part.detach().t() if transposed else part.detach()
    N, K = matrix.shape
    no_columns = torch.empty(0, dtype=torch.int32, device=matrix.device)
    w_int8, w_scale = quantize_rotated(
        matrix, no_columns, settings.block, settings.rotation, lambda rows: _largest(rows, group)
    )
    stored = w_int8, w_scale, matrix.new_empty(N, 0)
    packed = packing.pack(choice.weight_format, stored, N, K)
    form = {"N": N, "K": K, "dtype": part.dtype, "transposed": transposed}
    weight = QuantizedWeight(*packed, choice=choice, **form)
    weight.columns_among = group
    return weight


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weightᵀ + bias [N]`` of all processes' columns, in the first process.

    Args:
        bias: of which each process has a summand, as DTensor gives it.
    """
    settings, group = weight.choice.settings, weight.columns_among
    w_scale = weight.w_scale
    if x.shape[0] == 0:
        return x.new_empty(0, weight.N)
    rotated = rotate(x, settings.block, settings.rotation)
    x_scale = (_largest(rotated, group) / QMAX).clamp_min(MIN_SCALE)
    x_int8 = torch.round(rotated / x_scale.unsqueeze(1)).to(torch.int8)
    acc_int32 = torch_private.all_reduced(_integers(x_int8, rotated, weight), "sum", group)
    y = acc_int32.to(torch.float32) * x_scale.unsqueeze(1) * w_scale
    if bias is not None:
        y = y + torch_private.all_reduced(bias.to(torch.float32), "sum", group)
    y = y.to(x.dtype)
    return y if torch_private.is_first(group) else torch.zeros_like(y)


def _largest(rows: Tensor, group: str) -> Tensor:
    """``max |rows|`` of each row, over all processes; infinite where one has a NaN."""
    absmax = rows.abs().amax(1)
    # Which a maximum over processes would leave out.
    absmax = torch.where(absmax.isnan(), torch.inf, absmax)
    return torch_private.all_reduced(absmax, "max", group)


def _integers(x_int8: Tensor, like: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x_int8 @ w_int8ᵀ`` in int32, by the kernel of the device, whose results are in fp32: of two
    digits each, so that they are whole numbers below 2**24."""
    packed, ones = weight.tensors[0], torch.ones_like(weight.w_scale)
    of_rows = torch.ones_like(like[:, 0])

    def times(digit: Tensor) -> Tensor:
        return int8_linear(digit, of_rows, like, None, packed, ones, None).to(torch.int32)

    high = (x_int8.to(torch.int16) + _DIGIT // 2).div(_DIGIT, rounding_mode="floor")
    low = x_int8.to(torch.int16) - _DIGIT * high
    return _DIGIT * times(high.to(torch.int8)) + times(low.to(torch.int8))
