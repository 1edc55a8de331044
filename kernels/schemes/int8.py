"""Per-token int8 activations against int8 weights, with or without LLM.int8()'s decomposition.

    x̂ = x_int8 · x_scale[m] + x_outlier        ŵ = w_int8 · w_scale[n]

All of them are ``int8fx.quantize`` and ``int8fx.int8_linear``; they differ in the threshold (0: no
decomposition) and in whether a weight has a scale per channel or one for all.

The sum over x̂ and w_int8 is fp32 before it meets w_scale. Where it is above the largest float, the
result is not finite, though the product of float weights may be.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.formats.int8 import PER_CHANNEL, PER_TENSOR
from int8fx.kernels.formats.rotated import rotated
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.expert_linear import expert_linear
from int8fx.kernels.ops.quantize_reference import DECOMPOSITIONS as KINDS
from int8fx.kernels.ops.quantize_reference import quantize_reference
from int8fx.kernels.ops.rotated_linear import (
    quantize_rotated_reference,
    rotated_expert_linear,
    rotated_linear,
)
from int8fx.kernels.ops.rotation import NONE
from int8fx.kernels.schemes import settings as allowed
from int8fx.kernels.schemes.scheme import Call, Scheme
from int8fx.kernels.schemes.static_columns import BESIDE_OUTLIERS, operands, static_columns, which

STATIC = "static"


@dataclass(frozen=True)
class Outliers:
    """Which activations stay in 16-bit, see ``kernels/ops/quantize_reference.py``.

    Attributes:
        threshold: an activation of at least this size is an outlier; 0: there are none.
        decomposition: ``"column"`` or ``"token"``.
    """

    threshold: float = allowed.setting(6.0, allowed.threshold)
    decomposition: str = allowed.setting("column", allowed.one_of(*KINDS))

    @property
    def keeps_columns(self) -> bool:
        """Whether some columns stay in 16-bit for every token."""
        return self.decomposition == STATIC


@dataclass(frozen=True)
class LlmInt8(Outliers):
    """Of LLM.int8().

    Attributes:
        decomposition: also ``"static"``: some columns, the same for every token, and the outliers of
            what is left token by token.
        columns: which these are, ascending, with ``"static"``.
    """

    decomposition: str = allowed.setting("column", allowed.one_of(*KINDS, STATIC))
    columns: int | tuple[int, ...] = allowed.setting((), static_columns)

    def __post_init__(self) -> None:
        if self.columns and not self.keeps_columns:
            raise ValueError(
                f"columns={self.columns} with decomposition={self.decomposition!r}; allowed: 'static'"
            )

    @property
    def operator(self) -> str:
        """In the kernel table."""
        return BESIDE_OUTLIERS if self.keeps_columns else table.INT8_LINEAR


NO_OUTLIERS = Outliers(threshold=0.0)
_UNROTATED = 0, NONE  # the last settings of rotated_linear


def weight_format(settings: LlmInt8) -> WeightFormat:
    return rotated(*_UNROTATED, which(settings)) if settings.keeps_columns else PER_CHANNEL


def lower(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Outliers) -> Any:
    """quantize, then int8_linear; see ``passes/linears/lower.py`` for the graph."""
    if settings.keeps_columns:
        how = settings.threshold, *_UNROTATED
        return call(rotated_linear, x, *how, *operands(weight), bias)
    quantized = call(ops.quantize, x, settings.threshold, settings.decomposition)
    items = [call(operator.getitem, quantized, index) for index in range(2)]
    if settings.threshold == 0:
        # x stands in for its outliers: it carries the dtype and the gradient.
        items += [x, None]
    else:
        items += [call(operator.getitem, quantized, index) for index in (2, 3)]
    return call(ops.int8_linear, *items, *weight, bias)


def lower_experts(call: Call, x: Any, weight: Sequence[Any], routing: Any, settings: Outliers) -> Any:
    """expert_linear; ``routing`` are its ``experts`` and ``ends``."""
    if settings.keeps_columns:
        how = settings.threshold, *_UNROTATED
        return call(rotated_expert_linear, x, *how, *operands(weight), *routing)
    return call(expert_linear, x, settings.threshold, settings.decomposition, *weight, *routing)


def dequantized_input(x: Tensor, settings: Outliers) -> Tensor:
    if settings.keeps_columns:
        return _dequantized_beside_columns(x, settings)
    x_int8, x_scale, x_outlier, _ = quantize_reference(x, settings.threshold, settings.decomposition)
    x_hat = x_int8.to(torch.float32) * x_scale.unsqueeze(-1)
    return x_hat if settings.threshold == 0 else x_hat + x_outlier


def _dequantized_beside_columns(x: Tensor, settings: Any) -> Tensor:
    columns = torch.tensor(which(settings), dtype=torch.int64, device=x.device)
    how = settings.threshold, *_UNROTATED
    x_int8, x_scale, x_outlier, x_columns = quantize_rotated_reference(x, columns, *how)
    x_hat = x_int8.to(torch.float32) * x_scale.unsqueeze(-1)
    x_hat = x_hat + x_outlier if settings.threshold else x_hat
    return x_hat.index_copy(-1, columns, x_columns.to(torch.float32))


def at_once(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, settings: Outliers
) -> Tensor | None:
    """By the operator that ``passes/int8/join_linears.py`` puts into graphs, where a device has it."""
    joined = table.joined(x.device.type)
    if joined is None or settings.keeps_columns:
        return None
    target, _ = joined
    packed, w_scale = weight
    biases = [] if bias is None else [bias]
    return target(x, settings.threshold, settings.decomposition, [packed], [w_scale], biases)[0]


def lower_whole(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Any) -> Any:
    return lower(call, x, weight, bias, NO_OUTLIERS)


def dequantized_whole_input(x: Tensor, settings: Any) -> Tensor:
    return dequantized_input(x, NO_OUTLIERS)


def lower_whole_experts(call: Call, x: Any, weight: Sequence[Any], routing: Any, settings: Any) -> Any:
    return lower_experts(call, x, weight, routing, NO_OUTLIERS)


def whole_at_once(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, settings: Any
) -> Tensor | None:
    return at_once(x, weight, bias, NO_OUTLIERS)


DECOMPOSITIONS = {ops.quantize: quantize_reference}

LLM_INT8 = Scheme(
    "llm.int8",
    "per-token x, per-channel w, outliers of x in 16-bit",
    "Dettmers et al. 2022, arXiv 2208.07339, section 3.2",
    weight_format,
    LlmInt8,
    dequantized_input,
    lower,
    ops.quantize,
    DECOMPOSITIONS,
    lower_experts,
    table.INT8_LINEAR,
    at_once,
)
ABSMAX_VECTOR = Scheme(
    "absmax-vector",
    "per-token x, per-channel w",
    "Dettmers et al. 2022, section 3.1: vector-wise quantisation",
    lambda settings: PER_CHANNEL,
    dequantized_input=dequantized_whole_input,
    lower=lower_whole,
    quantizer=ops.quantize,
    decompositions=DECOMPOSITIONS,
    experts=lower_whole_experts,
    operator=table.INT8_LINEAR,
    at_once=whole_at_once,
)
ABSMAX_ROW = Scheme(
    "absmax-row",
    "per-token x, one scale for w",
    "Dettmers et al. 2022, Table 1; Khudia et al. 2021, arXiv 2101.05615 (FBGEMM), row-wise",
    lambda settings: PER_TENSOR,
    dequantized_input=dequantized_whole_input,
    lower=lower_whole,
    quantizer=ops.quantize,
    decompositions=DECOMPOSITIONS,
    operator=table.INT8_LINEAR,
    at_once=whole_at_once,
)
