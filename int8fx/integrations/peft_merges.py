"""Merges of peft's adapters into float weights, told to the store of packed ones.

Merging and unmerging write to ``weight.data``, of which no version is counted, and switch the adapter
off or on: a compiled model would go on without both. All kinds of adapters have their own two methods.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from int8fx.weights.store import STORE

_WATCHED = "_int8fx_watched"


def watch_merges() -> None:
    """From now on, of all kinds of adapters: those that there are, and those defined later."""
    for kind in _kinds(BaseTunerLayer):
        _watch(kind)
    BaseTunerLayer.__init_subclass__ = classmethod(_defined)  # type: ignore[assignment]


def _defined(kind: Any, **kwargs: Any) -> None:
    super(BaseTunerLayer, kind).__init_subclass__(**kwargs)
    _watch(kind)


def _watch(kind: Any) -> None:
    for name in ("merge", "unmerge"):
        method = vars(kind).get(name)
        if method is not None and not hasattr(method, _WATCHED):
            setattr(kind, name, _telling(method))


def _kinds(kind: Any) -> Iterator[Any]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _kinds(derived)


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:  # a merge of several adapters may fail at the second
            STORE.changed(self.get_base_layer().parameters())

    setattr(call, _WATCHED, True)
    return call
