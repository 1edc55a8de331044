"""A scheme: how one linear is quantised, from its weight and its input to its output.

    y ≈ x̂ @ ŵᵀ + bias        x̂ the input, ŵ the weight, as the scheme holds them

A scheme has two halves. Its **weight format** turns a float weight into the tensors that a compiled
graph takes as inputs. Its **lowering** computes the output from these. A lowering is written once,
against ``call(target, *args)``: given ``eagerly`` it computes on tensors, given an ``Emitter``'s
``call`` it writes the same operators into a graph (``passes/linears/lower.py``).

The table of all schemes is ``kernels/schemes/table.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.formats.format import WeightFormat

Call = Callable[..., Any]

CALIBRATED_COLUMNS = 8


def eagerly(target: Callable[..., Any], *args: Any) -> Any:
    """The ``call`` that runs a lowering at once, on tensors."""
    return target(*args)


@dataclass(frozen=True)
class Settings:
    """What the user chose for a scheme; each scheme names those that it reads.

    Attributes:
        threshold, decomposition: of the outliers, see ``kernels/ops/quantize_reference.py``.
        group_size: how many weights along K share a scale.
        block, rotation: see ``kernels/ops/rotation.py``.
        columns: how many columns of x a calibration keeps in 16-bit; None: ``CALIBRATED_COLUMNS``
            where there is one.
        static_columns: which these are, of one linear, ascending.
    """

    threshold: float = 6.0
    decomposition: str = "column"
    group_size: int = 128
    block: int = 64
    rotation: str = "hadamard"
    columns: int | None = None
    static_columns: tuple[int, ...] = ()


# (call, x [*, K], tensors of the weight, bias [N] or None, settings) -> y [*, N] of x's dtype
Lowering = Callable[[Call, Any, Sequence[Any], Any, Settings], Any]


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a linear.

    Attributes:
        name: as options and reports call it.
        formula: what it computes, in a line.
        source: the paper or the tool that it is from.
        reads: the settings that it depends on, by name.
        weight_format: how it keeps weights, given the settings.
        dequantized_input: x̂ ``[*, K]`` of ``x [*, K]``, in plain PyTorch.
        lower: the product, by operators that every device has.
        quantizer: which of these quantises x, or None; linears of one input share its call
            (``passes/int8/fuse_prologue.py``).
        decompositions: which of them Inductor is given to fuse instead of a call, and the aten form.
        experts: the same as ``lower`` for rows that each meet a matrix of their own, with the pair
            ``experts`` and ``ends`` of ``kernels/ops/expert_linear.py`` in the place of the bias; None
            where a
            scheme has no such product.
    """

    name: str
    formula: str
    source: str
    reads: frozenset[str]
    weight_format: Callable[[Settings], WeightFormat]
    dequantized_input: Callable[[Tensor, Settings], Tensor]
    lower: Lowering
    quantizer: Any
    decompositions: Mapping[Any, Callable[..., Any]]
    experts: Lowering | None = None

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
        """x̂ @ ŵᵀ + bias in float64: what the lowering must come to, but for rounding.

        Args:
            x: ``[*, K]``, weight: ``[N, K]``, bias: ``[N]`` or None; fp32, bf16 or fp16.
        """
        N, K = weight.shape
        kept = self.weight_format(settings)
        w_hat = kept.dequantize(kept.quantize(weight), N, K)
        y = self.dequantized_input(x, settings).double() @ w_hat.double().t()
        return y if bias is None else y + bias.double()

    def __str__(self) -> str:
        return f"{self.name}: {self.formula} ({self.source})"


@dataclass(frozen=True)
class Choice:
    """A scheme and its settings, as chosen for one linear."""

    scheme: Scheme
    settings: Settings

    @property
    def weight_format(self) -> WeightFormat:
        return self.scheme.weight_format(self.settings)

    def lower(self, call: Call, x: Any, weight: Sequence[Any], bias: Any) -> Any:
        return self.scheme.lower(call, x, weight, bias, self.settings)

    def lower_experts(self, call: Call, x: Any, weight: Sequence[Any], routing: Any) -> Any:
        assert self.scheme.experts is not None
        return self.scheme.experts(call, x, weight, routing, self.settings)


def unchanged(x: Tensor, settings: Settings) -> Tensor:
    """x̂ of a scheme that quantises weights only."""
    return x.to(torch.float32)
