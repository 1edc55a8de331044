"""Release: once a graph is compiled, its modules hold int8 weights in place of the float ones.

What ``quantize_`` does to a model before, the option ``release_weights`` does at the compile, with
what was packed for it. The rule is that whatever reads a released weight afterwards must neither crash
nor get garbage. Freed memory would have to be guarded: each reader met with an error that says what
happened and how to get the weight back. Nothing here is freed while something can still read it, so
most readers get a right answer instead:

| what reads it | what it gets |
|---|---|
| an eager call, another backend | LLM.int8(), on a CPU bit for bit as compiled |
| ``.to``, ``.half()``, ``copy.deepcopy``, ``pickle`` | the int8 weight, moved or copied |
| ``state_dict`` | ``weight`` (int8) and ``weight_scale``, as of a model that ``quantize_`` made |
| a sum, a view, a product in float64 | the values that the int8 form stands for |
| what writes to it (``init``, ``weight[0] = 0``) or trains it | an error that names the way back |
| a row (``weight[0]``), a diagonal, ``flatten`` | a float copy: a write to it does not arrive |
| ``load_state_dict`` of these entries into a float model | torch's error, which names each weight |

The exact float values are all that is gone, and the log says so: ``int8fx.dequantize_(model)`` brings a
float parameter back, with the values that the int8 one stands for.

This happens before Dynamo builds the guards of the graph, so it does not compile again.
"""

import logging
import warnings
from collections.abc import Collection

from torch import Tensor, nn

from int8fx import state_dict
from int8fx.compilation import Compilation
from int8fx.kernels.schemes.int8 import OF_BITSANDBYTES, PER_CHANNEL
from int8fx.quantize import holders_of
from int8fx.quantized_weight import Int8Weight
from int8fx.torch_private import source_owner
from int8fx.weights import Slot, weight_reason

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
            "release_weights: %d weights are in int8 now, and their float values are gone; "
            "int8fx.dequantize_(model) brings float weights back, rounded as they are",
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
    if slot.kept is not PER_CHANNEL:
        return f"the scheme keeps it {slot.kept.name}"
    weight = _int8_weight(compilation, slot, tensor)
    if weight is None:
        return f"it is seen through {slot.expression.recipe}"
    owner.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    state_dict.attach(owner)
    if isinstance(root, nn.Module):
        state_dict.check_on_load(root)
    return ""


def _int8_weight(compilation: Compilation, slot: Slot, tensor: Tensor) -> Int8Weight | None:
    """What takes the place of a parameter, sharing the memory that was packed for the graph."""
    packed, w_scale = compilation.store.get(tensor, slot.expression, slot.kept).tensors
    settings = next(
        choice.settings
        for candidate, choice in compilation.choices.items()
        if candidate.weight == slot.expression
    )
    for transposed in (False, True):
        weight = Int8Weight(
            packed,
            w_scale,
            K=tensor.shape[0 if transposed else 1],
            dtype=tensor.dtype,
            transposed=transposed,
            threshold=settings.threshold,
            decomposition=settings.decomposition,
        )
        if weight.shape == tensor.shape and not weight_reason(weight, slot.expression, slot.kept):
            return weight
    return None
