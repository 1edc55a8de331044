"""Int8 by groups: a scale for each ``group_size`` weights along K."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.format import ROWS, Axis, Part, WeightFormat
from int8fx.kernels.ops.quantize_reference import weight_scale

FAMILY = "int8 by groups"


@functools.cache
def grouped(group_size: int) -> WeightFormat:
    """``w_int8 [N, G · group_size]``, padded with zeros, and ``w_scale [N, G]`` fp32."""

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        K = weight.shape[1]
        padded = F.pad(weight.detach().to(torch.float32), (0, -K % group_size))
        groups = padded.unflatten(1, (-1, group_size))
        w_scale = weight_scale(groups)
        w_int8 = torch.round(groups / w_scale.unsqueeze(-1)).to(torch.int8)
        return w_int8.flatten(1).contiguous(), w_scale

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        w_int8, w_scale = stored
        return dequantize_groups(w_int8, w_scale, K)

    return WeightFormat(
        f"int8 by groups of {group_size}",
        (
            Part("int8", torch.int8, (ROWS, Axis("K", multiple=group_size))),
            Part("scale", torch.float32, (ROWS, Axis("K", group_size))),
        ),
        quantize,
        dequantize,
        granularity=group_size,
        family=FAMILY,
    )


def dequantize_groups(w_int8: Tensor, w_scale: Tensor, K: int) -> Tensor:
    """ŵ ``[N, K]`` fp32."""
    groups = w_int8.unflatten(1, (w_scale.shape[1], -1)).to(torch.float32)
    return (groups * w_scale.unsqueeze(-1)).flatten(1)[:, :K]
