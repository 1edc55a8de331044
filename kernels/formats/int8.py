"""Int8 with a scale per output channel, or one for all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.ops.quantize_reference import quantize_weight, weight_scale


def pack_per_channel(weight: Tensor) -> tuple[Tensor, ...]:
    """``w_int8`` as the device's kernel takes it, and ``w_scale [N]`` fp32."""
    w_int8, w_scale = quantize_weight(weight)
    return table.pack(w_int8), w_scale


def pack_per_tensor(weight: Tensor) -> tuple[Tensor, ...]:
    """The same with one scale, repeated: ``w_scale [N]``, all equal."""
    weight = weight.detach().to(torch.float32)
    scale = weight_scale(weight.flatten())
    w_int8 = torch.round(weight / scale).to(torch.int8).contiguous()
    return table.pack(w_int8), scale.repeat(weight.shape[0])


def dequantize(tensors: Sequence[Tensor], N: int, K: int) -> Tensor:
    weight, w_scale = tensors[:2]
    return table.unpack(weight, N, K).to(torch.float32) * w_scale.unsqueeze(1)


PER_CHANNEL = WeightFormat("int8 per channel", ("int8", "scale"), pack_per_channel, dequantize)


def _pack(w_int8: Tensor) -> tuple[Tensor]:
    return (table.pack(w_int8),)


def _unscaled(tensors: Sequence[Tensor], N: int, K: int) -> Tensor:
    return table.unpack(tensors[0], N, K).to(torch.float32)


# Of weights that are int8 already, and have their scales beside them.
OF_BITSANDBYTES = WeightFormat("int8 of bitsandbytes", ("int8",), _pack, _unscaled)


PER_TENSOR = WeightFormat("int8 per tensor", ("int8", "scale"), pack_per_tensor, dequantize)
