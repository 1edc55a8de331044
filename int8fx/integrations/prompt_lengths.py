"""One graph for prompts of all lengths: ``generate`` of a compiled model says which sizes vary.

Dynamo compiles for the sizes that it sees, and again with sizes that vary when it sees others. Of
``generate`` that makes five graphs::

    the first prompt     a prefill of its length     a decode step at its length     one at any length
    the second prompt    a prefill of any length     a decode step after it

The sizes that will vary are known before: the length of the prompt, and that of a cache which grows.
Marked in the first calls of the model, they make three graphs of these five. One of the decode steps is
for keys and values as the prefill leaves them, with the heads of a token side by side, where a step
leaves each head by itself. Put in that order before the first step, there are two graphs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from int8fx import torch_private

# What ``generate`` gives a model, by the dimensions that it may have, and which of these is a length.
# A mask of four is that of a static cache: its last dimension is the cache's, which does not vary.
LENGTHS: dict[str, dict[int, int]] = {
    "input_ids": {2: 1},
    "inputs_embeds": {3: 1},
    "attention_mask": {2: 1, 4: 2},
    "position_ids": {2: 1, 3: 2},
    "token_type_ids": {2: 1},
    "cache_position": {1: 0},
}
CACHES = ("past_key_values", "cache")  # as releases of transformers name it
OF_KEYS = 2  # the length of a cache's keys and values [batch, heads, length, head_dim]

# The prefill and a decode step. A later call compiles nothing, or what these sizes do not tell.
CALLS = 2

_PREPARE = "prepare_inputs_for_generation"


@contextlib.contextmanager
def lengths_vary(model: Any, backend: Callable[..., Any]) -> Iterator[None]:
    """For one ``generate``: marks the sizes, if the backend compiles the model's own calls.

    A model that was compiled with ``dynamic=False`` is left alone, and so is one that another thread
    generates with at the time.
    """
    request = torch_private.request_in_place(model)
    is_ours = request is not None and request.backend is backend and request.dynamic is not False
    if not is_ours or _PREPARE in vars(model):
        yield
        return
    vars(model)[_PREPARE] = _marking(getattr(model, _PREPARE))
    try:
        yield
    finally:
        vars(model).pop(_PREPARE, None)


def _marking(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare_inputs_for_generation``, with the sizes marked in what its first calls return."""
    calls = 0

    @functools.wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        inputs = prepare(*args, **kwargs)
        if calls < CALLS:
            calls += 1
            mark(inputs)
        return inputs

    return call


def mark(inputs: Mapping[str, Any]) -> None:
    """Marks the sizes of a model's inputs that vary from prompt to prompt, or from step to step.

    The keys and values of a cache become contiguous.
    """
    for name, dimensions in LENGTHS.items():
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() in dimensions:
            _vary(value, dimensions[value.dim()])
    for name in CACHES:
        for layer in getattr(inputs.get(name), "layers", ()):
            if _grows(layer):
                layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
                _vary(layer.keys, OF_KEYS)
                _vary(layer.values, OF_KEYS)


def _grows(layer: Any) -> bool:
    """Whether a cache's layer holds all tokens so far: neither a static one nor a window."""
    keys = getattr(layer, "keys", None)
    fixed = getattr(layer, "is_compileable", False) or getattr(layer, "is_sliding", False)
    return isinstance(keys, Tensor) and keys.dim() == OF_KEYS + 2 and not fixed


def _vary(tensor: Tensor, dimension: int) -> None:
    if tensor.shape[dimension] > 1:  # Dynamo compiles for a size of 1 apart
        torch_private.maybe_mark_dynamic(tensor, dimension)
