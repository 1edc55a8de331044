"""Release: once a graph is compiled, its modules hold int8 weights in place of the float ones.

The option ``release_weights`` does at the compile what ``quantize_`` does to a model before, with what
was packed for the graph, but for one thing: whoever gives the option wants what was compiled and no
more, and had float weights a moment ago. So nothing else reads a released weight unasked, as if it
were the float one:

| what reads it | what it gets |
|---|---|
| the compiled graph, and the next one for other shapes | the int8 weight |
| an eager call, another backend, an operator | ``ReleasedWeightError`` |
| ``state_dict``, ``copy.deepcopy``, ``pickle``, ``.to``, ``.half()`` | the same |
| ``int8fx.quantize_(model)`` | a model in int8, which everything may read |
| ``int8fx.dequantize_(model)`` | a float one, with the values that the int8 weights stand for |
| ``load_state_dict`` | quantises what it loads; the weight stays released |
| what tells its shape, dtype, device or size in memory | these |

The error names both ways back, the log the first time. The memory is not freed but taken over, so that
there is nothing to crash on.

This happens before Dynamo builds the guards of the graph, so it does not compile again.
"""

import functools
import logging
import warnings
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from int8fx.compiler.compilation import Compilation
from int8fx.compiler.swap import Slot
from int8fx.kernels.formats.int8 import OF_BITSANDBYTES
from int8fx.torch_private import source_owner
from int8fx.weights import state_dict
from int8fx.weights.sites import holders_of
from int8fx.weights.store import weight_reason
from int8fx.weights.tensor import QuantizedWeight

log = logging.getLogger(__name__)


def release(compilation: Compilation) -> Collection[int]:
    """Replaces the float weights of a compiled graph; returns their positions among its inputs.

    A weight that something else needs in float stays; a warning names it.
    """
    released, kept = set(), []
    for slot in compilation.slots:
        if slot.quantized or slot.kept is OF_BITSANDBYTES:
            continue
        reason = _release(compilation, slot)
        if reason:
            kept.append(f"{compilation.paths[compilation.placeholders[slot.position]]}: {reason}")
        else:
            released.add(slot.position)
    if released:
        log.info(
            "release_weights: %d weights are in int8 now, for what was compiled alone; "
            "int8fx.quantize_(model) lets everything read them, int8fx.dequantize_(model) brings float "
            "weights back, rounded as they are",
            len(released),
        )
    if kept:
        warnings.warn("release_weights kept " + "; ".join(kept), UserWarning, stacklevel=2)
    return released


def _release(compilation: Compilation, slot: Slot) -> str:
    """Why the weight of a slot was not released, or empty."""
    placeholder = compilation.placeholders[slot.position]
    tensor = compilation.inputs[slot.position]
    found = source_owner(placeholder)
    if found is None:
        return "it is a buffer"
    owner, name, root = found
    others = [str(h) for h in holders_of(root, tensor) if (h.module, h.name) != (owner, name)]
    if others:
        return f"its memory is that of {others[0]}, too"
    if tensor.dim() != 2:
        return "it is no matrix"
    if sum(other.position == slot.position for other in compilation.slots) > 1:
        return "it is packed in more than one form"
    if placeholder in compilation.root.graph.find_nodes(op="placeholder"):
        return "the graph reads it in float as well"
    weight = _quantized_weight(compilation, slot, tensor)
    if weight is None:
        return f"it is seen through {slot.expression.recipe}"
    weight.released = True
    owner.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    state_dict.attach(owner)
    if isinstance(root, nn.Module):
        state_dict.check_on_load(root)
        # Else ``.to`` would have moved what comes before this weight when it raises.
        root._apply = functools.partial(_apply, root)  # type: ignore[method-assign]
    return ""


def _apply(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """What ``.to`` and its like go through.

    Raises:
        ReleasedWeightError: names the first weight that was released; nothing is changed.
    """
    for name, weight in module.named_parameters():
        if isinstance(weight, QuantizedWeight):
            weight.check_readable(name)
    return type(module)._apply(module, *args, **kwargs)


def _quantized_weight(compilation: Compilation, slot: Slot, tensor: Tensor) -> QuantizedWeight | None:
    """What takes the place of a parameter, sharing the memory that was packed for the graph."""
    packed = compilation.store.get(tensor, slot.expression, slot.kept).tensors
    choice = next(
        choice
        for candidate, choice in compilation.choices.items()
        if candidate.weight == slot.expression and choice.weight_format.name == slot.kept.name
    )
    for transposed in (False, True):
        N, K = tensor.shape[::-1] if transposed else tensor.shape
        form = {"choice": choice, "N": N, "K": K, "dtype": tensor.dtype, "transposed": transposed}
        weight = QuantizedWeight(*packed, **form)
        if not weight_reason(weight, slot.expression, slot.kept):
            return weight
    return None
