"""Warns of ``generate`` on what ``torch.compile`` returned, which runs the model uncompiled.

``torch.compile(model)`` compiles calls of the wrapper that it returns. Other methods the wrapper takes
from the model, and when ``generate`` calls ``self``, that is the model itself. It is the same call as
``generate`` of the float model, which a user may well want beside the compiled one: so this warns, and
does not compile.

``int8fx/backend.py`` installs it, for processes that use the backend.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from int8fx import torch_private
from int8fx.compiler.watch import IN_PLACE

# The requests for the backend at the time when a model was looked for in them.
_seen: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()


def install(backend: Callable[..., Any]) -> None:
    """Makes ``generate`` of all models of transformers warn, once for each model."""
    from transformers.generation.utils import GenerationMixin

    mixin: Any = GenerationMixin
    mixin.generate = _warns(mixin.generate, backend)


def _warns(generate: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _only_its_wrapper_is_compiled(self, backend):
            warnings.warn(
                f"generate of {type(self).__name__} runs uncompiled: torch.compile(model) compiles "
                "calls of the wrapper that it returns, and generate calls the model inside. "
                + IN_PLACE,
                UserWarning,
                stacklevel=2,
            )
        return generate(self, *args, **kwargs)

    return call


def _only_its_wrapper_is_compiled(model: nn.Module, backend: Callable[..., Any]) -> bool:
    """Whether ``torch.compile`` wrapped a model and nothing compiles its own calls; True once."""
    requests = torch_private.requests(backend)
    # Looking for a wrapper takes tens of milliseconds; without another request there is no new one.
    if requests <= _seen.get(model, frozenset()) or torch_private.is_compiled(model):
        return False
    _seen[model] = requests
    return torch_private.is_wrapped(model, backend)
