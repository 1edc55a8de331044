"""The swap: a compiled graph's float weights become packed ones at every call."""

import dataclasses
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from int8fx.kernels.formats.format import WeightFormat
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.weights.identity import Snapshot
from int8fx.weights.store import Found, WeightStore


@dataclass(frozen=True)
class Slot:
    """One weight of a compiled graph.

    Attributes:
        position: of its tensor among the graph's inputs.
        expression: what makes its rows of that tensor.
        kept: how it is quantised.
        quantized: whether the tensor is a ``QuantizedWeight``.
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

    Args:
        slots: the graph's weights.
        kept: the positions of the inputs that stay.
        check_weights: whether a call compares samples of the weights' content, or only their state.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        kept: Sequence[int],
        store: WeightStore,
        check_weights: bool = True,
    ) -> None:
        self._slots = list(slots)
        self._float = [slot for slot in slots if not slot.quantized]
        self._kept = list(kept)
        self._store = store
        self.check_weights = check_weights  # may be changed between calls
        self._calls = 0
        self._last: Found | None = None
        # Blocks that share a graph take turns at each call.
        self._seen: dict[tuple[int, ...], Found] = {}
        store.swaps[id(self)] = self

    def replaced(self, positions: Collection[int]) -> None:
        """From the next call on, the inputs at these positions are ``QuantizedWeight``s."""
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
        """The packed weights for these arguments: the tensors of the first, of the second, ..."""
        packed = self._packed_floats(args)
        if len(self._float) == len(self._slots):
            return packed
        of_floats = iter(packed)
        parts: list[Tensor] = []
        for slot in self._slots:
            tensor = args[slot.position]
            if slot.quantized:
                parts += tensor.tensors
            else:
                parts += (next(of_floats) for _ in slot.kept.packed_names)
        return parts

    def _packed_floats(self, args: Sequence) -> list[Tensor]:
        if not self._float:
            return []
        tensors = [args[slot.position] for slot in self._float]
        self._calls += 1  # threads may count one call together: they read the same samples then
        last = self._last
        if last is not None and self._matches(last, tensors):
            return last.parts
        identity = tuple(map(id, tensors))
        found = self._seen.get(identity)
        if found is not None and self._matches(found, tensors):
            with self._store.lock:  # it may have been forgotten meanwhile
                self._last = self._seen.get(identity)
            return found.parts
        # Whoever tells the store of a change waits, and is heard afterwards.
        with self._store.lock:
            found = self._last = self._seen[identity] = self._look_up(tensors)
        return found.parts

    def _matches(self, found: Found, tensors: Sequence[Tensor]) -> bool:
        return found.snapshot.matches(tensors, int(self.check_weights), first=self._calls)

    def _look_up(self, tensors: Sequence[Tensor]) -> Found:
        parts: list[Tensor] = []
        snapshots: list[Snapshot] = []
        for slot, tensor in zip(self._float, tensors, strict=True):
            parts += self._store.get(tensor, slot.expression, slot.kept).tensors
            # Of each at once: a weight that another thread writes to meanwhile is packed in its new
            # state for the next slot, and what was packed for this one is of its old state.
            snapshots.append(self._store.snapshot(tensor))
        return Found(type(snapshots[0]).joined(snapshots), parts)

    def forget(self, identities: Set[int]) -> None:
        """Drops what was found for weights that have changed, or are gone."""
        gone = [key for key in list(self._seen) if not identities.isdisjoint(key)]
        if gone:
            self._last = None
        for key in gone:
            self._seen.pop(key, None)
