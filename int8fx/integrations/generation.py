"""``generate`` of transformers: few graphs where a model is compiled, a warning where its wrapper is.

``model.compile()`` compiles the model's own calls, those of ``generate`` among them. The sizes that
vary in these are marked, see ``prompt_lengths.py``.

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
from int8fx.integrations.prompt_lengths import lengths_vary

# The requests for the backend at the time when a model was looked for in them.
_seen: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()


def install(backend: Callable[..., Any]) -> None:
    """Makes ``generate`` of all models of transformers mark sizes, or warn, once for each model."""
    from transformers.generation.utils import GenerationMixin

    mixin: Any = GenerationMixin
    mixin.generate = _watched(mixin.generate, backend)


def _watched(generate: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
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
        with lengths_vary(self, backend):
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
