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


def put(layer: Any, quantized: Int8Weight, choice: Choice, fused: bool) -> None:
    """Makes an int8 weight that of a layer.

    Args:
        fused: whether the backend ``llmint8`` compiles the layer. It finds an ``F.linear`` then, which
            it rewrites and fuses.
    """
    layer.weight = nn.Parameter(quantized, requires_grad=False)
    layer.int8fx = None if fused else _product(quantized, choice)


def put_float(layer: Any, weight: Tensor, choice: Choice, fused: bool) -> None:
    """The same of a float weight ``[N, K]``, which is quantised."""
    if choice.weight_format is PER_CHANNEL:
        put(layer, Int8Weight.from_float(weight, **activation_options(choice)), choice, fused)
    else:
        layer.int8fx = of_float(weight, choice)
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)


def of_float(weight: Tensor, choice: Choice) -> Product:
    """The product with a float weight ``[N, K]``, quantised, by operators."""
    if choice.weight_format is PER_CHANNEL:
        return _product(Int8Weight.from_float(weight, **activation_options(choice)), choice)
    return Product(choice.weight_format.quantize(weight), choice)


def apply(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``[*, K]`` to ``[*, N]``."""
    if layer.int8fx is None:
        return F.linear(x, layer.weight, bias)
    return layer.int8fx(x, bias)


def _product(quantized: Int8Weight, choice: Choice) -> Product:
    parts = quantized.packed, quantized.w_scale
    joined = table.joined(quantized.device.type)
    return Product(parts, choice) if joined is None else JoinedProduct(parts, choice, joined[0])


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
