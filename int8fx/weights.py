"""Packed weights: each float weight is quantised once, however many graphs use it.

The store is keyed by the parameter's identity, the recipe that makes the ``[N, K]`` matrix of it
(``passes/weight_expression.py``) and the format that the scheme keeps weights in
(``kernels/scheme.py``). It holds parameters weakly, so a deleted model takes its int8 weights with
it. A weight that changed is seen at the next call: in-place edits count up ``_version``, and
``.data = `` brings another storage.

An ``Int8Weight`` is its own packed form, and needs no store.
"""

import dataclasses
import logging
import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.identity import Snapshot, State, snapshot, state_of
from int8fx.kernels.scheme import WeightFormat
from int8fx.kernels.schemes.int8 import PER_CHANNEL
from int8fx.passes.weight_expression import WeightExpression
from int8fx.quantized_weight import Int8Weight
from int8fx.torch_private import StorageReference, before_swaps

log = logging.getLogger(__name__)


def weight_reason(tensor: Tensor, expression: WeightExpression, kept: WeightFormat) -> str:
    """Why a tensor cannot be quantised to a format, or serve as what it already is; or empty."""
    if isinstance(tensor, Int8Weight):
        return _int8_reason(tensor, expression, kept)
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"weight is a {type(tensor).__name__}, no plain tensor"
    if tensor.layout is not torch.strided:
        return f"weight with layout {tensor.layout}"
    return ""


def _int8_reason(weight: Int8Weight, expression: WeightExpression, kept: WeightFormat) -> str:
    if kept is not PER_CHANNEL:
        return f"the weight is {PER_CHANNEL.name} already, and the scheme wants it {kept.name}"
    rows = expression.evaluate(weight.on_meta())
    # Views that keep all rows and columns have the same int8 form.
    whole = (weight.w_scale.shape[0], weight.K)
    if isinstance(rows, Int8Weight) and not rows.transposed and rows.shape == whole:
        return ""
    return f"an int8 weight cannot be seen through {expression.recipe or 'its transpose'}"


@dataclass(eq=False)
class PackedWeight:
    """The quantised form of one weight.

    Attributes:
        tensors: the parts of its format, as ``(w_int8, w_scale)``.
        state: of the float weight when it was quantised.
        float_bytes: of the float weight.
    """

    tensors: tuple[Tensor, ...]
    state: State
    float_bytes: int
    # Keeps the storage's identity from being given to a new one while this is compared with it.
    storage: StorageReference

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class WeightStore:
    """Float weights to packed ones."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, str, str], PackedWeight] = {}
        self._owners: dict[int, weakref.ref] = {}
        self._lock = threading.RLock()
        # Snapshots that compiled graphs hold; they must not outlive the weights, nor their ids.
        self.snapshots: weakref.WeakSet[WeightSwap] = weakref.WeakSet()

    def get(self, tensor: Tensor, expression: WeightExpression, kept: WeightFormat) -> PackedWeight:
        """The packed form of ``expression`` over ``tensor``, quantised now if need be."""
        if isinstance(tensor, Int8Weight):
            return _as_it_is(tensor)
        key = (id(tensor), expression.recipe, kept.name)
        with self._lock:
            packed = self._packed.get(key)
            state = state_of(tensor)
            if packed is None or packed.state != state:
                packed = self._packed[key] = _pack(tensor, expression, kept, state)
                self._watch(tensor)
            return packed

    def _watch(self, tensor: Tensor) -> None:
        identity = id(tensor)
        if identity not in self._owners:
            self._owners[identity] = weakref.ref(tensor, lambda _: self._forget(identity))

    def _forget(self, identity: int) -> None:
        with self._lock:
            del self._owners[identity]
            for snapshot in list(self.snapshots):
                snapshot.forget(identity)
            for key in [key for key in self._packed if key[0] == identity]:
                del self._packed[key]

    def let_go(self, tensor: Tensor) -> None:
        """Drops what is kept of a tensor that is about to change, and the weak reference to it."""
        if id(tensor) in self._owners:
            self._forget(id(tensor))

    def forms(self, tensor: Tensor) -> list[PackedWeight]:
        """What is kept of one weight: a form for every recipe and format that a graph asked for."""
        return [packed for key, packed in self._packed.items() if key[0] == id(tensor)]


def _pack(
    tensor: Tensor, expression: WeightExpression, kept: WeightFormat, state: State
) -> PackedWeight:
    with torch.no_grad():
        matrix = expression.evaluate(tensor.detach())
        tensors = kept.quantize(matrix)
    log.debug("quantised %s%s: %s", tuple(matrix.shape), expression.recipe, kept.name)
    return PackedWeight(tensors, state, matrix.nbytes, StorageReference(tensor))


def _as_it_is(weight: Int8Weight) -> PackedWeight:
    tensors = weight.packed, weight.w_scale
    float_bytes = weight.numel() * weight.dtype.itemsize
    return PackedWeight(tensors, state_of(tensors[0]), float_bytes, StorageReference(tensors[0]))


STORE = WeightStore()
before_swaps(STORE.let_go)


@dataclass(frozen=True)
class Slot:
    """One weight of a compiled graph.

    Attributes:
        position: of its tensor among the graph's inputs.
        expression: what makes its rows of that tensor.
        kept: how it is quantised.
        quantized: whether the tensor is an ``Int8Weight``.
    """

    position: int
    expression: WeightExpression
    kept: WeightFormat
    quantized: bool


class WeightSwap:
    """Turns a graph's arguments into those of its rewritten form, at every call.

    The float weights go out, unless the graph still uses them, and the packed pairs come in, at the
    end. What was found last time for the same tensors in the same state is used again, so a call costs
    one comparison of their snapshot.
    """

    def __init__(self, slots: Sequence[Slot], kept: Sequence[int], store: WeightStore) -> None:
        self._slots = list(slots)
        self._float = [slot for slot in slots if not slot.quantized]
        self._kept = list(kept)
        self._store = store
        self._last: tuple[Snapshot, list[Tensor]] | None = None
        # Blocks that share a graph take turns at each call.
        self._seen: dict[tuple[int, ...], tuple[Snapshot, list[Tensor]]] = {}
        store.snapshots.add(self)

    def replaced(self, positions: Collection[int]) -> None:
        """From the next call on, the inputs at these positions are ``Int8Weight``s."""
        self._slots = [
            dataclasses.replace(slot, quantized=slot.quantized or slot.position in positions)
            for slot in self._slots
        ]
        self._float = [slot for slot in self._slots if not slot.quantized]
        self._last = None
        self._seen.clear()

    def __call__(self, args: Sequence) -> list:
        return [args[position] for position in self._kept] + self.packed(args)

    def packed(self, args: Sequence) -> list[Tensor]:
        """The packed weights for these arguments: ``[w_packed, w_scale, w_packed, w_scale, ...]``."""
        packed = self._packed_floats(args)
        if len(self._float) == len(self._slots):
            return packed
        of_floats = iter(packed)
        parts: list[Tensor] = []
        for slot in self._slots:
            tensor = args[slot.position]
            if slot.quantized:
                parts += (tensor.packed, tensor.w_scale)
            else:
                parts += (next(of_floats) for _ in slot.kept.parts)
        return parts

    def _packed_floats(self, args: Sequence) -> list[Tensor]:
        tensors = [args[slot.position] for slot in self._float]
        last = self._last
        if last is not None and last[0].matches(tensors):
            return last[1]
        identity = tuple(map(id, tensors))
        known = self._seen.get(identity)
        if known is None or not known[0].matches(tensors):
            known = self._seen[identity] = (snapshot(tensors), self._look_up(tensors))
        self._last = known
        return known[1]

    def _look_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        parts: list[Tensor] = []
        for slot, tensor in zip(self._float, tensors, strict=True):
            parts += self._store.get(tensor, slot.expression, slot.kept).tensors
        return parts

    def forget(self, identity: int) -> None:
        """Drops what was found for a tensor that is gone."""
        self._last = None
        for key in [key for key in list(self._seen) if identity in key]:
            self._seen.pop(key, None)
