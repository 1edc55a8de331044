"""Offloading with accelerate: ``cpu_offload``, ``disk_offload``, ``dispatch_model``, ``device_map``.

What accelerate offloads waits as its entry of the ``state_dict``, on the CPU or on disk, and comes to
its module for each call: there it makes every parameter of its own entry alone. An int8 weight has
two (``int8fx/weights/state_dict.py``), so from the import of this module on a hook of accelerate is
given such
weights whole. Nothing has to be called: an int8 weight imports this when accelerate first offloads it.
Hooks of modules without int8 weights work as they did.

bitsandbytes' int8 weights have a place in accelerate's own code. It knows scales by their name
``SCB``, of which ours would not be the same bit for bit (``SCB / 127`` is not every float).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from int8fx.weights import state_dict
from int8fx.weights.tensor import QuantizedWeight


class _Whole(Mapping[str, Any]):
    """The entries that a hook has for a module, and for each int8 weight the weight itself."""

    def __init__(self, entries: Mapping[str, Any], weights: Mapping[str, QuantizedWeight]) -> None:
        self._entries, self._weights = entries, weights

    def __getitem__(self, name: str) -> Tensor | None:
        weight = self._weights.get(name)
        return self._entries[name] if weight is None else state_dict.read(name, weight, self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _reads_whole_weights(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of accelerate's hook that brings a module's tensors back."""

    @functools.wraps(method)
    def call(self: AlignDevicesHook, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entries = self.weights_map
        weights = {
            name: weight
            for name, weight in module.named_parameters(recurse=self.place_submodules)
            if isinstance(weight, QuantizedWeight)
        }
        if not self.offload or not weights or entries is None:
            return method(self, module, *args, **kwargs)
        self.weights_map = _Whole(entries, weights)
        try:
            return method(self, module, *args, **kwargs)
        finally:
            # transformers saves what it finds there, entry by entry.
            self.weights_map = entries

    return torch.compiler.disable(call)


def _install() -> None:
    hook: Any = AlignDevicesHook
    hook.pre_forward = _reads_whole_weights(hook.pre_forward)
    hook.detach_hook = _reads_whole_weights(hook.detach_hook)


_install()
