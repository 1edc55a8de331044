"""A scheme: how one linear is quantised, from its weight and its input to its output.

    y ≈ x̂ @ ŵᵀ + bias        x̂ the input, ŵ the weight, as the scheme holds them

A scheme has three parts. Its **settings** are a dataclass with a default and a check for each
(``kernels/schemes/settings.py``). Its **weight format** says how a float weight is stored. Its
**lowering** computes the output from the packed weight. A lowering is written once, against
``call(target, *args)``: given ``eagerly`` it computes on tensors, given an ``Emitter``'s ``call`` it
writes the same operators into a graph (``passes/linears/lower.py``).

The table of all schemes is ``kernels/schemes/table.py``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels import packing, table
from int8fx.kernels.formats.format import WeightFormat, stacked
from int8fx.kernels.schemes.settings import NoSettings, checked_setting, checks_of, names_of

Call = Callable[..., Any]


# The operator of a scheme that multiplies by the de-quantised weight.
DEQUANTIZED = "dequantized_linear"


def eagerly(target: Callable[..., Any], *args: Any) -> Any:
    """The ``call`` that runs a lowering at once, on tensors."""
    return target(*args)


def unchanged(x: Tensor, settings: Any) -> Tensor:
    """x̂ of a scheme that quantises weights only."""
    return x.to(torch.float32)


# (call, x [*, K], packed weight, bias [N] or None, settings) -> y [*, N] of x's dtype
Lowering = Callable[[Call, Any, Sequence[Any], Any, Any], Any]
# (x [M, K], packed weight, bias, settings) -> y [M, N]; None: there is none
AtOnce = Callable[[Tensor, Sequence[Tensor], Tensor | None, Any], Tensor | None]


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a linear.

    Attributes:
        name: as options and reports call it.
        formula: what it computes, in a line.
        source: the paper or the tool that it is from.
        weight_format: how it stores weights, given the settings.
        settings: its dataclass of settings.
        dequantized_input: x̂ ``[*, K]`` of ``x [*, K]`` and the settings, in plain PyTorch.
        lower: the product, by operators that every device has; None: the weight is de-quantised and
            multiplied in x's dtype.
        quantizer: which of these quantises x, or None; linears of one input share its call
            (``passes/int8/share_quantizations.py``).
        decompositions: which of them Inductor is given to fuse instead of a call, and the aten form.
        experts: the same as ``lower`` for rows that each meet a matrix of their own, with the pair
            ``experts`` and ``ends`` of ``kernels/ops/expert_linear.py`` in the place of the bias; None
            where a scheme has no such product.
        operator: what its product is in the kernel table (``kernels/table.py``).
        at_once: what a device has in the place of all of ``lower``'s operators, for an eager call.
        each_expert: whether rows that each meet a matrix of their own are multiplied by that product,
            expert after expert, where there is no ``experts`` (``kernels/schemes/experts.py``).
    """

    name: str
    formula: str
    source: str
    weight_format: Callable[[Any], WeightFormat]
    settings: type = NoSettings
    dequantized_input: Callable[[Tensor, Any], Tensor] = unchanged
    lower: Lowering | None = None
    quantizer: Any = None
    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    experts: Lowering | None = None
    operator: str = DEQUANTIZED
    at_once: AtOnce | None = None
    each_expert: bool = False

    @property
    def reads(self) -> frozenset[str]:
        """The names of its settings."""
        return names_of(self.settings)

    def choice(self, **settings: Any) -> "Choice":
        """The scheme with some settings, and defaults for the others.

        Raises:
            ValueError: names a setting that there is none of, or a value and what is allowed.
        """
        checks = checks_of(self.settings)
        for name in settings:
            if name not in checks:
                known = ", ".join(sorted(checks)) or "none"
                raise ValueError(f"scheme {self.name!r} has no setting {name!r}; it has: {known}")
        checked = {
            name: checked_setting(f"setting {name!r} of {self.name!r}", value, checks[name])
            for name, value in settings.items()
        }
        return Choice(self, self.settings(**checked))

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Tensor:
        """x̂ @ ŵᵀ + bias in float64: what the lowering must come to, but for rounding.

        Args:
            x: ``[*, K]``, weight: ``[N, K]``, bias: ``[N]`` or None; fp32, bf16 or fp16.
        """
        N, K = weight.shape
        weight_format = self.weight_format(settings)
        w_hat = weight_format.dequantize(weight_format.quantize(weight), N, K)
        y = self.dequantized_input(x, settings).double() @ w_hat.double().t()
        return y if bias is None else y + bias.double()

    def __str__(self) -> str:
        return f"{self.name}: {self.formula} ({self.source})"


@dataclass(frozen=True)
class Choice:
    """A scheme and its settings, as chosen for one linear."""

    scheme: Scheme
    settings: Any

    def __deepcopy__(self, memo: Any) -> "Choice":
        return self  # nothing of it changes

    @functools.cached_property
    def weight_format(self) -> WeightFormat:
        return self.scheme.weight_format(self.settings)

    @property
    def options(self) -> dict[str, Any]:
        """What ``int8fx.quantize_`` takes for it."""
        return {"scheme": self.scheme.name, **asdict(self.settings)}

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The packed form of a float weight ``[N, K]``, or ``[E, N, K]``, for its device."""
        stored = stacked(self.weight_format, weight)
        return packing.pack(self.weight_format, stored, *weight.shape[-2:])

    @property
    def apart_from_columns(self) -> tuple[str, dict[str, Any]]:
        """The scheme and its settings but for ``columns``, which a calibration gives to each weight."""
        settings = asdict(self.settings)
        settings.pop("columns", None)
        return self.scheme.name, settings

    def refusal(self, device_type: str) -> str | None:
        """Why a device cannot serve it, or None."""
        return table.refusal(device_type, self.weight_format.family, self.operator)

    @property
    def operator(self) -> str:
        """What its product is in the kernel table: of some schemes it depends on the settings."""
        return getattr(self.settings, "operator", self.scheme.operator)

    def note(self, device_type: str) -> str:
        """Why no kernel of a device computes it, or empty."""
        weight_format = self.weight_format
        return table.without_kernel(
            weight_format.name, weight_format.family, self.operator, device_type
        )

    def lower(self, call: Call, x: Any, weight: Sequence[Any], bias: Any) -> Any:
        if self.scheme.lower is None:
            return call(dequantized_linear(self.weight_format), x, bias, *weight)
        return self.scheme.lower(call, x, weight, bias, self.settings)

    def product(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """The product of tensors, ``x [M, K]``: by one operator where the device has it."""
        if self.scheme.at_once is not None:
            y = self.scheme.at_once(x, weight, bias, self.settings)
            if y is not None:
                return y
        return self.lower(eagerly, x, weight, bias)

    def lower_experts(self, call: Call, x: Any, weight: Sequence[Any], routing: Any) -> Any:
        assert self.scheme.experts is not None
        return self.scheme.experts(call, x, weight, routing, self.settings)


def at_once_by_lists(
    operator: str, family: str, one: Callable[..., Any], alike: int, lower: Lowering
) -> AtOnce:
    """``Scheme.at_once`` of a lowering that calls ``one``, where a device has an operator of lists of
    linears in its place (``table.joined_by``).

    Args:
        alike: how many arguments of ``one`` linears have in common; the operator takes lists of others.
    """

    def at_once(
        x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, settings: Any
    ) -> Tensor | None:
        found = table.joined_by(operator, x.device.type, family)
        if found is None:
            return None
        several = found[0]

        def call(target: Callable[..., Any], *args: Any) -> Any:
            if target is not one:
                return target(*args)
            lists = ([] if each is None else [each] for each in args[alike:])
            return several(*args[:alike], *lists)[0]

        return lower(call, x, weight, bias, settings)

    return at_once


@functools.cache
def dequantized_linear(weight_format: WeightFormat) -> Callable[..., Tensor]:
    """``(x [*, K], bias, *packed weight) -> y``: the product of a format that has no kernel."""

    def product(x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
        N, K = weight_format.rows(packed), x.shape[-1]
        stored = packing.unpack(weight_format, packed, N, K)
        w_hat = weight_format.dequantize(stored, N, K).to(x.dtype)
        return F.linear(x, w_hat, None if bias is None else bias.to(x.dtype))

    return product
