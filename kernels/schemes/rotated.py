"""Rotated int8: a block Hadamard rotation inside the quantiser, and fixed columns in 16-bit.

    x̂ = rotate⁻¹(Q(rotate(x without columns))) + x at columns        ŵ the same of w

The rotation spreads a large column over its block, so that one scale a token is enough, and a row's
result depends on that row alone (``kernels/ops/rotated_linear.py``). The columns, which a calibration
finds (``int8fx.calibrate``), take care of what is large in every token. Without one there are none.

How far y may be from x wᵀ follows from the scales: with r and v the rotated rows of x and of w,

    |y - x wᵀ| <= Σ (x_scale / 2 + ε_x) |v̂| + |r| (w_scale / 2 + ε_w)  +  round-off of the sums
    ε_x <= log2(block) 2**-24 2**-⌊log2(block) / 2⌋ Σ_block |x|,  what the rotation itself rounds

``int8fx/testing/rotations.py`` computes it, and tests hold every kernel to it.

Sources: QuaRot (arXiv 2404.00456) and ConvRot (arXiv 2512.03673) for the rotation; Dettmers et al. 2022
for columns in 16-bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.formats.rotated import rotated
from int8fx.kernels.ops import rotated_linear as ops
from int8fx.kernels.ops.quantize_reference import quantize_reference, quantize_weight
from int8fx.kernels.ops.rotation import ROTATIONS, allowed_blocks, rotate_back_input
from int8fx.kernels.schemes.scheme import Call, Scheme
from int8fx.kernels.schemes.settings import NotAllowed, one_of, setting
from int8fx.kernels.schemes.static_columns import OPERATOR, operands, static_columns, which


def allowed_block(value: Any) -> int:
    allowed = allowed_blocks(ROTATIONS[0])
    if isinstance(value, bool) or value not in allowed:
        raise NotAllowed(", ".join(map(str, allowed)))
    return value


@dataclass(frozen=True)
class Rotation:
    """Attributes:
    block: the largest block of columns that is rotated, see ``kernels/ops/rotation.py``.
    rotation: a name of ``ROTATIONS`` there.
    columns: which columns of x stay in 16-bit. As an option also how many of a calibration's.
    """

    block: int = setting(64, allowed_block)
    rotation: str = setting("hadamard", one_of(*ROTATIONS))
    columns: int | tuple[int, ...] = setting((), static_columns)

    @property
    def keeps_columns(self) -> bool:
        """Whether a calibration gives it columns."""
        return True

    @property
    def quantizes_head(self) -> bool:
        """Whether with a calibration an output head is in int8, too."""
        return True


def weight_format(settings: Rotation) -> WeightFormat:
    """Raises:
    ValueError: the settings say how many columns, and not which; or a block that the rotation lacks.
    """
    if settings.block not in allowed_blocks(settings.rotation):
        sizes = ", ".join(map(str, allowed_blocks(settings.rotation)))
        raise ValueError(
            f"block={settings.block} with rotation={settings.rotation!r}; allowed: {sizes}"
        )
    return rotated(settings.block, settings.rotation, which(settings))


def lower(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Rotation) -> Any:
    """rotated_linear; see ``passes/int8/join_rotated.py`` for several of one x."""
    how = 0.0, settings.block, settings.rotation
    return call(ops.rotated_linear, x, *how, *operands(weight), bias)


def at_once(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, settings: Rotation
) -> Tensor | None:
    """By the operator that ``passes/int8/join_rotated.py`` puts into graphs, where a device has one
    that stands for a single linear as well."""
    found = table.joined_by(OPERATOR, x.device.type)
    if found is None or found[0] is ops.rotated_linears:
        return None
    lists = ([tensor] for tensor in operands(weight))
    biases = [] if bias is None else [bias]
    return found[0](x, 0.0, settings.block, settings.rotation, *lists, biases)[0]


def lower_experts(call: Call, x: Any, weight: Sequence[Any], routing: Any, settings: Rotation) -> Any:
    how = 0.0, settings.block, settings.rotation
    return call(ops.rotated_expert_linear, x, *how, *operands(weight), *routing)


def dequantized_input(x: Tensor, settings: Rotation) -> Tensor:
    block, rotation = settings.block, settings.rotation
    columns = torch.tensor(which(settings), dtype=torch.int32, device=x.device)
    x_int8, x_scale, _, x_columns = ops.quantize_rotated_reference(x, columns, 0.0, block, rotation)
    rows = x_int8.double() * x_scale.double().unsqueeze(-1)
    x_hat = rotate_back_input(rows, x.shape[-1], block, rotation)
    return x_hat.index_copy(-1, columns.long(), x_columns.double())


def without_rotation(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Rotation) -> Tensor:
    """What the scheme would come to without its rotation, in fp32."""
    columns = torch.tensor(which(settings), dtype=torch.int64, device=x.device)
    x, weight = x.float(), weight.float()
    x_int8, x_scale, _, _ = quantize_reference(x.index_fill(-1, columns, 0), 0.0, "token")
    w_int8, w_scale = quantize_weight(weight.index_fill(1, columns, 0))
    x_hat = (x_int8 * x_scale.unsqueeze(-1)).index_copy(-1, columns, x.index_select(-1, columns))
    w_hat = (w_int8 * w_scale.unsqueeze(1)).index_copy(1, columns, weight.index_select(1, columns))
    return F.linear(x_hat, w_hat, None if bias is None else bias.float())


INT8_ROTATED = Scheme(
    "int8-rotated",
    "per-token rotated x, per-channel rotated w, calibrated columns in 16-bit",
    "QuaRot, arXiv 2404.00456; ConvRot, arXiv 2512.03673",
    weight_format,
    Rotation,
    dequantized_input,
    lower,
    experts=lower_experts,
    operator=OPERATOR,
    at_once=at_once,
)
