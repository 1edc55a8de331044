"""Packed weights: each float weight is quantised once, however many graphs use it.

The store is keyed by the parameter's identity, the recipe that makes the ``[N, K]`` matrix of it
(``passes/graph/weight_expression.py``) and the format that the scheme keeps weights in
(``kernels/schemes/scheme.py``). It holds parameters weakly, so a deleted model takes its int8 weights
with
it. A weight that changed is seen at the next call, in one of two ways: the call compares it with the
snapshot of what was quantised (``int8fx/weights/identity.py``), or somebody has told the store
(``int8fx/weights/changes.py``). What was packed of it, in whatever form and for whatever graph, goes
at once.

A ``QuantizedWeight`` is its own packed form, and needs no store.
"""

import logging
import threading
import weakref
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels import packing
from int8fx.kernels.forks import free_in_children
from int8fx.kernels.formats.format import WeightFormat, stacked
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.torch_private import StorageReference, before_swaps
from int8fx.weights.identity import Snapshot, snapshot
from int8fx.weights.memory import AddressRange, AddressRanges, has_memory
from int8fx.weights.tensor import QuantizedWeight

log = logging.getLogger(__name__)


def weight_reason(tensor: Tensor, expression: WeightExpression, weight_format: WeightFormat) -> str:
    """Why a tensor cannot be quantised to a format, or serve as what it already is; or empty."""
    if isinstance(tensor, QuantizedWeight):
        return _int8_reason(tensor, expression, weight_format)
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"weight is a {type(tensor).__name__}, no plain tensor"
    if tensor.layout is not torch.strided:
        return f"weight with layout {tensor.layout}"
    return ""


def _int8_reason(weight: QuantizedWeight, expression: WeightExpression, wanted: WeightFormat) -> str:
    if wanted.name != weight.weight_format.name:
        return (
            f"the weight is {weight.weight_format.name} already, and the scheme wants it {wanted.name}"
        )
    rows = expression.on_meta(weight.on_meta())
    # Views that keep all rows and columns have the same packed form.
    whole = (*weight.batch, weight.N, weight.K)
    if isinstance(rows, QuantizedWeight) and not rows.transposed and rows.shape == whole:
        return ""
    seen = expression.recipe or "its transpose"
    return f"{weight.weight_format.a_weight} cannot be seen through {seen}"


@dataclass(eq=False)
class PackedWeight:
    """The quantised form of one weight.

    Attributes:
        tensors: as a product takes them, ``(packed w_int8, w_scale)`` of int8.
        float_bytes: of the float weight.
    """

    tensors: tuple[Tensor, ...]
    float_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class _Weight:
    """A float weight as it was when it was packed, and its packed forms by recipe and format."""

    def __init__(self, tensor: Tensor) -> None:
        self.snapshot = snapshot([tensor])
        self.memory = AddressRange.of(tensor)
        self.forms: dict[tuple[str, str], PackedWeight] = {}
        # Keeps the storage's identity from being given to a new one while this is compared with it.
        self._storage = StorageReference(tensor)


class WeightStore:
    """Float weights to packed ones."""

    def __init__(self) -> None:
        self._weights: dict[int, _Weight] = {}
        self._owners: dict[int, weakref.ref] = {}
        self.lock = threading.RLock()
        # What compiled graphs found here; it must not outlive the weights, nor their ids.
        self.swaps: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def get(
        self, tensor: Tensor, expression: WeightExpression, weight_format: WeightFormat
    ) -> PackedWeight:
        """The packed form of ``expression`` over ``tensor``, quantised now if need be.

        Raises:
            RuntimeError: the tensor's storage was made smaller than it.
        """
        if isinstance(tensor, QuantizedWeight):
            return _as_it_is(tensor)
        form = expression.recipe, weight_format.name
        with self.lock:
            weight = self._as_now(tensor)
            if form not in weight.forms:
                weight.forms[form] = _pack(tensor, expression, weight_format)
            return weight.forms[form]

    def snapshot(self, tensor: Tensor) -> Snapshot:
        """Of a float weight that was just got, as it was when it was packed."""
        return self._weights[id(tensor)].snapshot

    def _as_now(self, tensor: Tensor) -> _Weight:
        identity = id(tensor)
        weight = self._weights.get(identity)
        if weight is None or not weight.snapshot.matches([tensor]):
            self._drop({identity})
            _check_memory(tensor)
            # Before it is packed: what is written meanwhile makes the next call pack again.
            weight = self._weights[identity] = _Weight(tensor)
            if identity not in self._owners:
                self._owners[identity] = weakref.ref(tensor, lambda _: self._forget(identity))
        return weight

    def _forget(self, identity: int) -> None:
        # A weight may go at any time, in a thread that holds any lock: the end of one waits for none.
        self._owners.pop(identity, None)
        self._drop({identity})

    def _drop(self, identities: Set[int]) -> None:
        """What was packed of these weights goes, from here and from every compiled graph."""
        if [identity for identity in identities if self._weights.pop(identity, None) is not None]:
            for reference in self.swaps.valuerefs():
                if (swap := reference()) is not None:
                    swap.forget(identities)

    def changed(self, tensors: Iterable[Tensor]) -> None:
        """These, and whatever lies in their memory, are quantised again at the next call.

        Tensors of other kinds (a ``DTensor``, of which FSDP2 makes weights in other memory) stand for
        all weights that require a gradient if they do, and for all that do not if they do not.
        """
        if not self._weights:
            return
        tensors = [tensor for tensor in tensors if not isinstance(tensor, QuantizedWeight)]
        given = set(map(id, tensors))
        plain = AddressRanges(AddressRange.of(tensor) for tensor in tensors if has_memory(tensor))
        elsewhere = {tensor.requires_grad for tensor in tensors if not has_memory(tensor)}
        with self.lock:
            changed = set()
            for identity in list(self._weights):
                weight, owner = self._weights.get(identity), self._owners.get(identity, lambda: None)()
                if weight is None or owner is None:  # its end may be noticed at any time
                    continue
                shared = identity in given or plain.overlap(weight.memory)
                if shared or owner.requires_grad in elsewhere:
                    changed.add(identity)
            self._drop(changed)

    def clear(self) -> None:
        """Every weight is quantised again at its next call."""
        with self.lock:
            self._drop(set(self._weights))

    def let_go(self, tensor: Tensor) -> None:
        """Drops what is kept of a tensor that is about to change, and the weak reference to it."""
        if id(tensor) in self._owners:
            self._forget(id(tensor))

    def forms(self, tensor: Tensor) -> list[PackedWeight]:
        """What is kept of one weight: a form for every recipe and format that a graph asked for."""
        weight = self._weights.get(id(tensor))
        return [] if weight is None else list(weight.forms.values())


def _check_memory(tensor: Tensor) -> None:
    """Reading on would end the process."""
    if type(tensor) in (Tensor, torch.nn.Parameter) and not has_memory(tensor):
        held = tensor.untyped_storage().nbytes()
        raise RuntimeError(
            f"a weight of shape {list(tensor.shape)} and {tensor.dtype} cannot be quantised: its "
            f"storage was resized, and has {held} bytes"
        )


def _pack(tensor: Tensor, expression: WeightExpression, weight_format: WeightFormat) -> PackedWeight:
    with torch.no_grad():
        matrix = expression.evaluate(tensor.detach())
        tensors = packing.pack(weight_format, stacked(weight_format, matrix), *matrix.shape[-2:])
    log.debug("quantised %s%s: %s", tuple(matrix.shape), expression.recipe, weight_format.name)
    return PackedWeight(tensors, matrix.nbytes)


def _as_it_is(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(weight.tensors, weight.numel() * weight.dtype.itemsize)


STORE = WeightStore()
free_in_children(STORE.lock)
before_swaps(STORE.let_go)


@dataclass(frozen=True)
class Found:
    """What the store had for some weights as they were then."""

    snapshot: Snapshot
    parts: list[Tensor]
