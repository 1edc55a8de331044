"""The product of one layer of vLLM: ``y [*, N] = x [*, K] @ ŵᵀ + bias`` in a scheme."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8fx.kernels import packing
from int8fx.kernels.formats.format import TENSOR
from int8fx.kernels.schemes.scheme import Choice
from int8fx.weights.tensor import QuantizedWeight


class Product(nn.Module):
    """By the scheme's operators, which vLLM's own compilers and eager mode take as they are.

    Its parts are buffers, so that compilers take them as inputs.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.choice = weight.choice
        self.names = tuple(f"part{index}" for index in range(len(weight.tensors)))
        for name, part in zip(self.names, weight.tensors, strict=True):
            self.register_buffer(name, part, persistent=False)
        # The first call looks up which kernel serves, under a lock, which no compiler traces.
        self(weight.tensors[0].new_zeros(1, weight.K, dtype=weight.dtype), None)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [getattr(self, name) for name in self.names]
        y = self.choice.product(x.reshape(-1, x.shape[-1]), parts, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def put(layer: Any, quantized: QuantizedWeight, fused: bool) -> None:
    """Makes a quantised weight that of a layer.

    Args:
        fused: whether the backend ``llmint8`` compiles the layer. It finds an ``F.linear`` then, which
            it rewrites and fuses.
    """
    layer.weight = nn.Parameter(quantized, requires_grad=False)
    layer.int8fx = None if fused else Product(quantized)


def quantized(weight: Tensor, choice: Choice, widths: Sequence[int]) -> QuantizedWeight:
    """A float weight ``[N, K]`` in a scheme.

    Args:
        widths: N of each matrix that it is made of. One scale for a whole matrix is one for each.
    """
    weight_format = choice.weight_format
    if weight_format.granularity != TENSOR or len(widths) == 1:
        return QuantizedWeight.quantized(weight, choice, transposed=False)
    N, K = weight.shape
    each = [weight_format.quantize(matrix) for matrix in weight.split(list(widths))]
    stored = [torch.cat(parts) for parts in zip(*each, strict=True)]
    packed = packing.pack(weight_format, stored, N, K)
    form = {"N": N, "K": K, "dtype": weight.dtype, "transposed": False}
    return QuantizedWeight(*packed, choice=choice, **form)


def apply(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``[*, K]`` to ``[*, N]``."""
    if layer.int8fx is None:
        return F.linear(x, layer.weight, bias)
    return layer.int8fx(x, bias)


def int8_weight(w_int8: Tensor, w_scale: Tensor, choice: Choice, dtype: torch.dtype) -> QuantizedWeight:
    """
    Args:
        w_int8: ``[N, K]``.
        w_scale: ``[N]`` fp32.
        choice: a scheme of weights in int8 with a scale per channel.
        dtype: of the activations.
    """
    N, K = w_int8.shape
    packed = packing.pack(choice.weight_format, (w_int8, w_scale), N, K)
    return QuantizedWeight(*packed, choice=choice, N=N, K=K, dtype=dtype, transposed=False)
