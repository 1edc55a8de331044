"""A scheme as another package would add it: 4-bit weights by groups along K, with zero points.

    ŵ[n, k] = (w_int4[n, k] - zero_point[n, g]) · scale[n, g],   g = k // group

Two integers are packed into a byte, the even column in its low half. The file is all that there is of
the scheme: nothing of int8fx knows it before ``int8fx.SCHEMES`` does.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.format import ROWS, Axis, Part, WeightFormat
from int8fx.kernels.schemes.scheme import Scheme
from int8fx.kernels.schemes.settings import multiple_of, setting

LARGEST = 15


@dataclass(frozen=True)
class Settings:
    """Attributes:
    group: how many weights along K share a scale and a zero point.
    """

    group: int = setting(16, multiple_of(2))


@functools.cache
def by_groups(group: int) -> WeightFormat:
    """``packed [N, K / 2]`` uint8, ``scale [N, G]`` fp32, ``zero_point [N, G]`` uint8; K is padded."""

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        padded = F.pad(weight.detach().to(torch.float32), (0, -weight.shape[1] % group))
        groups = padded.unflatten(1, (-1, group))
        least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = ((most - least) / LARGEST).clamp_min(2.0**-126)
        zero_point = torch.round(-least / scale)
        steps = torch.round(groups / scale.unsqueeze(-1)) + zero_point.unsqueeze(-1)
        codes = steps.clamp(0, LARGEST).to(torch.uint8).flatten(1)
        return codes[:, ::2] | codes[:, 1::2] << 4, scale, zero_point.to(torch.uint8)

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        packed, scale, zero_point = stored
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        steps = codes.unflatten(1, (-1, group)).to(scale.dtype) - zero_point.unsqueeze(-1)
        return (steps * scale.unsqueeze(-1)).flatten(1)[:, :K]

    by_group = Axis("K", group)
    return WeightFormat(
        f"int4 by groups of {group}, with zero points",
        (
            Part("packed", torch.uint8, (ROWS, Axis("K", 2, multiple=group))),
            Part("scale", torch.float32, (ROWS, by_group)),
            Part("zero_point", torch.uint8, (ROWS, by_group)),
        ),
        quantize,
        dequantize,
        bits=4,
        granularity=group,
        zero_point=True,
        family="int4 by groups",
    )


W4A16 = Scheme(
    "w4a16",
    "x as it is, w in 4 bits by groups along K, with zero points",
    "int8fx/testing/four_bits.py",
    lambda settings: by_groups(settings.group),
    Settings,
)
