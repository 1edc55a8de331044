"""How a module with quantised weights prints: with its scheme, bits and bytes.

Linear(in_features=64, out_features=32, bias=False, llm.int8, 8 bits, 2,176 bytes)
"""

import weakref
from typing import Any

import torch
from torch import nn

from int8fx.weights.distributed import local
from int8fx.weights.tensor import QuantizedWeight

NAME = "extra_repr"  # what a module prints itself by


class Description:
    """Stands in the place of a module's ``extra_repr``.

    A class, for modules are copied and pickled. It does not keep the module: what is dropped is freed
    at once, and not by the collector of cycles.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return Description, (self._module(),)

    def __call__(self) -> str:
        module = self._module()
        assert module is not None  # it is asked by way of the module
        own = type(module).extra_repr(module)
        if torch.compiler.is_compiling():  # torch.vmap names the module, and Dynamo traces how
            return own
        parameters = map(local, module.parameters(recurse=False))
        weights = [weight for weight in parameters if isinstance(weight, QuantizedWeight)]
        return ", ".join(filter(None, (own, *map(_of_weight, weights))))


def _of_weight(weight: QuantizedWeight) -> str:
    bits = weight.weight_format.bits
    return f"{weight.choice.scheme.name}, {bits} bits, {weight.int8_bytes:,} bytes"


def attach(module: nn.Module) -> None:
    module.__dict__[NAME] = Description(module)


def forget(module: nn.Module) -> None:
    if isinstance(module.__dict__.get(NAME), Description):
        del module.__dict__[NAME]
