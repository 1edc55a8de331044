"""A linear that ``int8fx.prepare_qat_`` prepared: its class, of which it is an instance until it is
converted.

The class is made of the module's own, and adds a ``forward``. The weight stays the float parameter that
it was, under its name, so optimizers, checkpoints and whatever wraps a model know it as before.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.straight_through import straight_through_linear
from int8fx.kernels.schemes.text import as_text


class PreparedLinear:
    """What a prepared class adds to the module's own, ``made_of``."""

    made_of: type[nn.Module]
    qat_scheme: str
    qat_settings: str
    qat_transposed: bool  # whether the weight is [K, N]
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.qat_transposed else self.weight
        bias, device = self.bias, x.device.type
        # As for any linear; the weight is quantised from what it is.
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        return straight_through_linear(x, weight, bias, self.qat_scheme, self.qat_settings)

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join(filter(None, (own, f"trained in {self.qat_scheme}")))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # No module has the class under a name: a copy makes it anew.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return (_empty, (self.made_of,), *reduced[2:])


@functools.cache
def prepared(kind: Any) -> Any:
    """The class of a prepared module, made of the one that it has."""
    return type(f"Qat{kind.__name__}", (PreparedLinear, kind), {"made_of": kind})


def _empty(kind: Any) -> nn.Module:
    made = prepared(kind)
    return made.__new__(made)


def attributes_of(choice: Choice, transposed: bool) -> dict[str, Any]:
    """What a prepared module is told.

    Args:
        transposed: whether its weight is ``[K, N]``.
    """
    scheme, settings = as_text(choice)
    return dict(zip(_ATTRIBUTES, (scheme, settings, transposed), strict=True))


_ATTRIBUTES = ("qat_scheme", "qat_settings", "qat_transposed")


def prepare(module: nn.Module, attributes: dict[str, Any]) -> None:
    """From now on a module computes in a scheme's arithmetic."""
    kind: Any = type(module)
    module.__class__ = prepared(kind)
    module.__dict__.update(attributes)


def take_back(module: nn.Module) -> dict[str, Any]:
    """The inverse; what it had been told."""
    assert isinstance(module, PreparedLinear)
    module.__class__ = module.made_of  # type: ignore[assignment]
    return {name: module.__dict__.pop(name) for name in _ATTRIBUTES}
