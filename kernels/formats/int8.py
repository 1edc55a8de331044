"""Int8 with a scale per output channel, or one for all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels.formats.format import COLUMNS, ROWS, TENSOR, Part, WeightFormat
from int8fx.kernels.ops.quantize_reference import quantize_weight, weight_scale

# What the rows of the kernel table serve: ``w_int8 [N, K]``, and ``w_scale [N]`` fp32.
FAMILY = "int8"
INT8 = Part("int8", torch.int8, (ROWS, COLUMNS))
SCALE = Part("scale", torch.float32, (ROWS,))


def quantize_per_tensor(weight: Tensor) -> tuple[Tensor, ...]:
    """``w_int8`` with one scale, repeated: ``w_scale [N]``, all equal."""
    weight = weight.detach().to(torch.float32)
    scale = weight_scale(weight.flatten())
    w_int8 = torch.round(weight / scale).to(torch.int8).contiguous()
    return w_int8, scale.repeat(weight.shape[0])


def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
    w_int8, w_scale = stored
    return w_int8.to(torch.float32) * w_scale.unsqueeze(1)


PER_CHANNEL = WeightFormat(
    "int8 per channel", (INT8, SCALE), quantize_weight, dequantize, family=FAMILY
)
PER_TENSOR = WeightFormat(
    "int8 per tensor",
    (INT8, SCALE),
    quantize_per_tensor,
    dequantize,
    granularity=TENSOR,
    family=FAMILY,
    stored_as=PER_CHANNEL.name,
)


def _as_it_is(w_int8: Tensor) -> tuple[Tensor]:
    return (w_int8,)


def _unscaled(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
    return stored[0].to(torch.float32)


# Of weights that are int8 already, and have their scales beside them.
OF_BITSANDBYTES = WeightFormat("int8 of bitsandbytes", (INT8,), _as_it_is, _unscaled, family=FAMILY)
