"""Weights of a few bits by groups along K, with activations as they are or in int8.

    w4a16-group    y = x ŵᵀ + bias
    w4a8-group     y = x̂ ŵᵀ + x[:, columns] @ w[:, columns]ᵀ + bias      x̂ per token, both sides rotated
    wna16-group    the first, with other bits than 4
    nf4            the first, ŵ of a codebook

ŵ is that of ``kernels/formats/grouped.py`` and ``codebook.py``. In ``w4a8-group`` the rotation makes
int8 activations cost nothing beside 16-bit ones, and a few calibrated columns in 16-bit halve the error
of the weights. A column that stays is taken out of the row and of the weight before they are rotated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.formats.codebook import CODEBOOKS, absmax_of, codebook, values_of
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.formats.grouped import WHOLE, ZEROS, grouped
from int8fx.kernels.formats.rotated_groups import rotated_groups
from int8fx.kernels.gpu import composed
from int8fx.kernels.ops import grouped_linear as ops
from int8fx.kernels.ops.codebook_linear import codebook_linear, codebook_linear_backward
from int8fx.kernels.ops.rotated_linear import quantize_rotated_reference
from int8fx.kernels.ops.rotation import NONE, ROTATIONS, allowed_blocks, rotate_back_input
from int8fx.kernels.schemes.rotated import allowed_block
from int8fx.kernels.schemes.scheme import Call, Scheme, at_once_by_lists
from int8fx.kernels.schemes.settings import NotAllowed, multiple_of, one_of, setting, whole_number
from int8fx.kernels.schemes.static_columns import static_columns, which

_SOURCE = "GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978"


def _group_size(value: Any) -> int:
    if value == WHOLE and not isinstance(value, bool):
        return WHOLE
    try:
        return multiple_of(16)(value)
    except NotAllowed as allowed:
        raise NotAllowed(f"{allowed}, or {WHOLE}: all of K") from None


@dataclass(frozen=True)
class Groups:
    """Attributes:
    group_size: how many weights along K share a scale; -1: all of them.
    zeros: which code stands for 0, by a name of ``kernels/formats/grouped.py``: ``"middle"`` is
        symmetric, ``"integer"``, ``"float"`` and ``"offset"`` are stored for each group.
    act_order: whether groups are of columns that need not lie side by side, as GPTQ's act-order has
        them.
    """

    group_size: int = setting(32, _group_size)
    zeros: str = setting("integer", one_of(*ZEROS))
    act_order: bool = setting(False)


@dataclass(frozen=True)
class ScaledGroups(Groups):
    """Attributes:
    column_scale: whether x is multiplied by a number for each column, which AWQ chooses.
    """

    column_scale: bool = setting(False)

    def weight_format(self, bits: int) -> WeightFormat:
        return grouped(bits, self.group_size, self.zeros, self.act_order, self.column_scale)


@dataclass(frozen=True)
class GroupsOfBits(ScaledGroups):
    """Attributes:
    bits: of a code.
    """

    bits: int = setting(8, whole_number(1, 8))


@dataclass(frozen=True)
class RotatedGroups(Groups):
    """Attributes:
    block: the largest block of columns that is rotated, see ``kernels/ops/rotation.py``.
    rotation: a name of ``ROTATIONS`` there, or ``"none"``.
    columns: which columns of x stay in 16-bit. As an option also how many of a calibration's.
    """

    block: int = setting(64, allowed_block)
    rotation: str = setting("hadamard", one_of(*ROTATIONS, NONE))
    columns: int | tuple[int, ...] = setting((), static_columns)

    @property
    def keeps_columns(self) -> bool:
        """Whether a calibration gives it columns."""
        return not self.act_order

    @property
    def is_plain(self) -> bool:
        """Whether its weights are those of ``w4a16-group``."""
        return self.rotation == NONE and not self.columns


@dataclass(frozen=True)
class Codebook:
    """Attributes:
    quant_type: ``"nf4"`` or ``"fp4"``.
    blocksize: how many weights along K share an absmax.
    double_quant: whether absmax is in 8 bits itself.
    """

    quant_type: str = setting("nf4", one_of(*CODEBOOKS))
    blocksize: int = setting(64, whole_number(1, 4096))
    double_quant: bool = setting(True)


# --- x as it is -----------------------------------------------------------------------------------


def lower_float(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: ScaledGroups) -> Any:
    """grouped_float_linear, of x with its columns in the order of the weight's."""
    if settings.column_scale:
        *weight, column_scale = weight
        x = call(_as_dtype_of, call(torch.mul, x, column_scale), x)
    x, packed, scale, zero_point, _ = _operands(call, x, weight, settings)
    how = settings.group_size, settings.zeros
    return call(ops.grouped_float_linear, x, *how, packed, scale, zero_point, bias)


_as_dtype_of = torch.ops.aten.type_as.default


def _operands(call: Call, x: Any, weight: Sequence[Any], settings: Groups) -> tuple[Any, ...]:
    """x, the packed codes, scales, zero points or None, and what else the weight consists of."""
    packed, scale, *others = weight
    zero_point = None if settings.zeros == "middle" else others.pop(0)
    if settings.act_order:
        x = call(torch.index_select, x, -1, others.pop(0))
    return x, packed, scale, zero_point, others


W4A16_GROUP = Scheme(
    "w4a16-group",
    "x as it is, w in 4 bits by groups of group_size along K",
    _SOURCE,
    lambda settings: settings.weight_format(4),
    ScaledGroups,
    lower=lower_float,
    operator=ops.FLOAT_ROWS,
    each_expert=True,
    at_once=at_once_by_lists(ops.FLOAT_ROWS, ops.FAMILY, ops.grouped_float_linear, 3, lower_float),
)
WNA16_GROUP = Scheme(
    "wna16-group",
    "x as it is, w in 1 to 8 bits by groups of group_size along K",
    _SOURCE + "; HQQ",
    lambda settings: settings.weight_format(settings.bits),
    GroupsOfBits,
    each_expert=True,
)


def lower_codebook(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Codebook) -> Any:
    """codebook_linear, of an absmax that is not nested."""
    packed, *absmax = weight
    values = call(values_of, settings.quant_type, packed)
    whole = call(absmax_of, absmax)
    return call(codebook_linear, x, packed, whole, values, settings.blocksize, bias)


NF4 = Scheme(
    "nf4",
    "x as it is, w of a codebook of 16 values by blocks of blocksize along K",
    "QLoRA, arXiv 2305.14314; bitsandbytes",
    lambda settings: codebook(settings.quant_type, settings.blocksize, settings.double_quant),
    Codebook,
    lower=lower_codebook,
    decompositions={
        codebook_linear: composed.codebook_linear,
        codebook_linear_backward: composed.codebook_linear_backward,
    },
    each_expert=True,
)


# --- x in int8 ------------------------------------------------------------------------------------


def weight_format(settings: RotatedGroups) -> WeightFormat:
    """Raises:
    ValueError: the settings say how many columns, and not which; a block that the rotation lacks; or
        groups of columns that do not lie side by side, of a weight that is rotated.
    """
    group, zeros = settings.group_size, settings.zeros
    if settings.is_plain:
        return grouped(4, group, zeros, settings.act_order)
    if settings.act_order:
        raise ValueError(
            f"act_order=True with rotation={settings.rotation!r} and columns={settings.columns}; "
            "allowed: rotation='none' and no columns"
        )
    if settings.rotation != NONE and settings.block not in allowed_blocks(settings.rotation):
        sizes = ", ".join(map(str, allowed_blocks(settings.rotation)))
        raise ValueError(
            f"block={settings.block} with rotation={settings.rotation!r}; allowed: {sizes}"
        )
    return rotated_groups(4, group, zeros, settings.block, settings.rotation, which(settings))


def lower(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: RotatedGroups) -> Any:
    """grouped_linear, of x with its columns in the order of the weight's."""
    x, packed, scale, zero_point, others = _operands(call, x, weight, settings)
    _, *decomposed = others or (None, None, None)
    how = settings.group_size, settings.zeros, settings.block, settings.rotation
    return call(ops.grouped_linear, x, *how, packed, scale, zero_point, *decomposed, bias)


def dequantized_input(x: Tensor, settings: RotatedGroups) -> Tensor:
    """x̂ in float64, as ``rotated.py`` has it."""
    block, rotation = settings.block, settings.rotation
    columns = torch.tensor(which(settings), dtype=torch.int32, device=x.device)
    x_int8, x_scale, _, x_columns = quantize_rotated_reference(x, columns, 0.0, block, rotation)
    x_hat = x_int8.double() * x_scale.double().unsqueeze(-1)
    if rotation != NONE:
        x_hat = rotate_back_input(x_hat, x.shape[-1], block, rotation)
    return x_hat.index_copy(-1, columns.long(), x_columns.double())


W4A8_GROUP = Scheme(
    "w4a8-group",
    "per-token rotated x in int8, rotated w in 4 bits by groups, calibrated columns in 16-bit",
    f"{_SOURCE}; QuaRot, arXiv 2404.00456",
    weight_format,
    RotatedGroups,
    dequantized_input,
    lower,
    operator=ops.INT8_ROWS,
    each_expert=True,
    at_once=at_once_by_lists(ops.INT8_ROWS, ops.FAMILY, ops.grouped_linear, 5, lower),
)
