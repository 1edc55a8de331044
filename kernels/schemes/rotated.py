"""Rotated int8: a block Hadamard rotation inside the quantiser, and fixed columns in 16-bit.

    x̂ = rotate_back(Q(rotate(x without columns))) + x at columns        ŵ the same of w

The rotation spreads a large column over its block, so that one scale a token is enough, and a row's
result depends on that row alone (``kernels/ops/rotated_linear.py``). The columns, which a calibration
finds (``int8fx.calibrate``), take care of what is large in every token. Without one there are none.

The bound of the output, with r the row's rotated elements, p = ⌊log2(block) / 2⌋ and H orthonormal:

    |y - x wᵀ| <= x_scale (1/2 + ρ) Σ|w_rotated hat| + w_scale / 2 · Σ|r| + round-off of the sums
    ρ = log2(block) 2**-24 Σ|x| 2**-p / x_scale, what the butterflies round

Sources: QuaRot (arXiv 2404.00456) and ConvRot (arXiv 2512.03673) for the rotation; Dettmers et al. 2022
for columns in 16-bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.formats.rotated import rotated
from int8fx.kernels.ops import rotated_linear as ops
from int8fx.kernels.ops.rotation import rotate_back_input
from int8fx.kernels.schemes.scheme import Call, Scheme, Settings


def weight_format(settings: Settings) -> WeightFormat:
    return rotated(settings.block, settings.rotation, settings.static_columns)


def lower(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Settings) -> Any:
    """rotated_linear; see ``passes/int8/join_rotated.py`` for several of one x."""
    return call(ops.rotated_linear, x, settings.block, settings.rotation, *weight, bias)


def lower_experts(call: Call, x: Any, weight: Sequence[Any], routing: Any, settings: Settings) -> Any:
    return call(ops.rotated_expert_linear, x, settings.block, settings.rotation, *weight, *routing)


def dequantized_input(x: Tensor, settings: Settings) -> Tensor:
    block, rotation = settings.block, settings.rotation
    columns = torch.tensor(settings.static_columns, dtype=torch.int32, device=x.device)
    x_int8, x_scale, x_columns = ops.quantize_rotated_reference(x, columns, block, rotation)
    rows = x_int8.double() * x_scale.double().unsqueeze(-1)
    x_hat = rotate_back_input(rows, x.shape[-1], block, rotation)
    return x_hat.index_copy(-1, columns.long(), x_columns.double())


INT8_ROTATED = Scheme(
    "int8-rotated",
    "per-token rotated x, per-channel rotated w, calibrated columns in 16-bit",
    "QuaRot, arXiv 2404.00456; ConvRot, arXiv 2512.03673",
    frozenset({"block", "rotation", "columns"}),
    weight_format,
    dequantized_input,
    lower,
    None,
    {},
    lower_experts,
)
