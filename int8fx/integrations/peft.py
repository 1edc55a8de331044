"""LoRA adapters of peft on int8 weights: from the import of this module on, unmerging is exact.

Nothing from here is needed to train, save, load or merge an adapter. Merging adds it to the weight and
quantises the sum; taking it away again would leave a base that was rounded twice. So a layer keeps the
int8 weight that it had for as long as it is merged, and puts it back. That takes the memory of a second
int8 weight, which ``merge_and_unload`` gives back with the layer. A merged weight that was changed
(``load_state_dict``), moved or copied in between is left to peft, which takes the adapter away from
what is there.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor

from int8fx.torch_private import version_of
from int8fx.weights.identity import State, state_of
from int8fx.weights.tensor import QuantizedWeight

BEFORE = "_int8fx_before_merge"


@dataclass(frozen=True)
class _Before:
    """The weight before a layer was merged, and the state that it was in after."""

    weight: Tensor
    merged: tuple[int, State]


def _keeps(merge: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(merge)
    def call(self: Linear, *args: Any, **kwargs: Any) -> None:
        weight: Any = self.get_base_layer().weight
        if not isinstance(weight, QuantizedWeight):
            return merge(self, *args, **kwargs)
        saved = self.__dict__.pop(BEFORE, None)
        before: Any = None if self.merged else weight.detach().clone()
        if saved is not None and self.merged and _state(weight) == saved.merged:
            before = saved.weight
        try:
            merge(self, *args, **kwargs)
        finally:  # safe_merge may refuse one adapter when others are merged already
            if before is not None and self.merged:
                self.__dict__[BEFORE] = _Before(before, _state(weight))
        return None

    return call


def _restores(unmerge: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(unmerge)
    def call(self: Linear) -> None:
        weight: Any = self.get_base_layer().weight
        saved = self.__dict__.pop(BEFORE, None)
        exact = (
            saved is not None and isinstance(weight, QuantizedWeight) and _state(weight) == saved.merged
        )
        unmerge(self)
        if exact and not self.merged:
            weight.copy_(saved.weight)

    return call


def _state(weight: QuantizedWeight) -> tuple[int, State]:
    # What is written to its parts inside of an operator counts up the weight's version, and not theirs.
    return version_of(weight), state_of(weight.packed)


def _install() -> None:
    layer: Any = Linear
    layer.merge = _keeps(layer.merge)
    layer.unmerge = _restores(layer.unmerge)


_install()
