"""The product of one layer of vLLM: ``y [*, N] = x [*, K] @ ŵᵀ + bias`` in a scheme."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8fx.kernels import table
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.kernels.schemes.scheme import Choice, eagerly
from int8fx.weights.parts import pack
from int8fx.weights.tensor import Int8Weight


class Product(nn.Module):
    """By the scheme's operators, which vLLM's own compilers and eager mode take as they are.

    Args:
        parts: the weight as the scheme keeps it; buffers, so that compilers take them as inputs.
    """

    def __init__(self, parts: Sequence[Tensor], choice: Choice) -> None:
        super().__init__()
        self.choice = choice
        self.names = tuple(f"part{index}" for index in range(len(parts)))
        for name, part in zip(self.names, parts, strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [getattr(self, name) for name in self.names]
        return self.choice.lower(eagerly, x, parts, bias)


class JoinedProduct(Product):
    """By the one operator that quantises x as well, where a device has it."""

    def __init__(self, parts: Sequence[Tensor], choice: Choice, operator: Any) -> None:
        super().__init__(parts, choice)
        self.operator = operator
        self.activation = tuple(activation_options(choice).values())

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        biases = [] if bias is None else [bias]
        (y,) = self.operator(rows, *self.activation, [self.part0], [self.part1], biases)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class FusedProduct(nn.Module):
    """By an ``F.linear``, which the backend ``llmint8`` finds, rewrites and fuses."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


def of_float(weight: Tensor, choice: Choice, fused: bool) -> tuple[nn.Module, nn.Parameter]:
    """The product with a float weight ``[N, K]``, and the parameter that takes its place.

    Args:
        fused: whether the backend ``llmint8`` compiles the layer.
    """
    if choice.weight_format is PER_CHANNEL:
        return of_int8(Int8Weight.from_float(weight, **activation_options(choice)), choice, fused)
    empty = nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)
    return Product(choice.weight_format.quantize(weight), choice), empty


def of_int8(weight: Int8Weight, choice: Choice, fused: bool) -> tuple[nn.Module, nn.Parameter]:
    """The same of an int8 weight."""
    parameter = nn.Parameter(weight, requires_grad=False)
    if fused:
        return FusedProduct(parameter), parameter
    parts = weight.packed, weight.w_scale
    joined = table.joined(weight.device.type)
    if joined is None:
        return Product(parts, choice), parameter
    return JoinedProduct(parts, choice, joined[0]), parameter


def int8_weight(w_int8: Tensor, w_scale: Tensor, choice: Choice, dtype: torch.dtype) -> Int8Weight:
    """
    Args:
        w_int8: ``[N, K]``.
        w_scale: ``[N]`` fp32.
        dtype: of the activations.
    """
    form = {"K": w_int8.shape[1], "dtype": dtype, "transposed": False}
    return Int8Weight(pack(w_int8), w_scale, **form, **activation_options(choice))


def activation_options(choice: Choice) -> dict[str, Any]:
    """What an ``Int8Weight`` keeps of a scheme: schemes that take out no outliers have threshold 0."""
    threshold = choice.settings.threshold if "threshold" in choice.scheme.reads else 0.0
    return {"threshold": threshold, "decomposition": choice.settings.decomposition}
