"""Memory as the programs of a launch see it: stores come late, loads may be of the past.

``order.py`` says what is promised. Every element is for itself: nothing but a barrier and a release
orders two stores of one program, and nothing but an acquire two loads.
"""

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from triton._C.libtriton import interpreter as raw


class MissingBarrier(AssertionError):
    """A program read what others of its threads may have stored, with no barrier between."""


@dataclass
class Pending:
    """A store that other programs need not see yet.

    Attributes:
        fenced: whether a barrier came after it, or it was made by the thread that also makes atomics.
        by_one: whether a single thread made it.
    """

    value: np.generic
    fenced: bool
    by_one: bool


class Memory:
    """What all programs share, and what it held before.

    Attributes:
        history: by address, when it was written and what it held until then.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.time = 0
        self.history: dict[int, list[tuple[int, np.generic]]] = {}

    def remember(self, address: int, before: np.generic) -> None:
        self.time += 1
        self.history.setdefault(address, []).append((self.time, before))


class View:
    """Memory as one program sees it.

    Attributes:
        without: the guards that count for nothing (``order.GUARDS``).
        acquired: the time of its last acquire.
        floor: by address, the time of the last write to it that the program has seen.
    """

    def __init__(self, memory: Memory, without: Collection[str]) -> None:
        self.memory, self.without = memory, without
        self.pending: dict[int, Pending] = {}
        self.acquired = 0
        self.floor: dict[int, int] = {}

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        by_one = addresses.size == 1
        wanted = mask.reshape(-1)
        stored = np.broadcast_to(values, addresses.shape).reshape(-1)[wanted]
        for address, value in zip(addresses.reshape(-1)[wanted].tolist(), stored, strict=True):
            self.pending[address] = Pending(value, by_one, by_one)

    def load(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """What the program sees, where ``values`` is what memory holds.

        Raises:
            MissingBarrier: it is what another thread of the program may have stored, or may not yet.
        """
        if not (self.pending or self.memory.history):
            return values
        seen = values.copy()
        pairs = zip(addresses.reshape(-1).tolist(), mask.reshape(-1).tolist(), strict=True)
        for place, (address, wanted) in enumerate(pairs):
            if not wanted:
                continue
            own = self.pending.get(address)
            if own is not None:
                if not (own.fenced or (own.by_one and addresses.size == 1)):
                    raise MissingBarrier("a load of what was stored since the last barrier")
                seen.flat[place] = own.value.view(seen.dtype)
            elif address in self.memory.history:
                seen.flat[place] = self._seen(address, seen.flat[place])
        return seen

    def _seen(self, address: int, current: np.generic) -> np.generic:
        writes = self.memory.history[address]
        known = max(self.acquired, self.floor.get(address, 0))
        later = [number for number, (time, _) in enumerate(writes) if time > known]
        if not later or self.memory.random.random() < 0.5:
            self.floor[address] = writes[-1][0]
            return current
        number = self.memory.random.choice(later)
        self.floor[address] = max(known, writes[number - 1][0] if number else 0)
        return writes[number][1].view(current.dtype)

    def barrier(self) -> None:
        if "barriers" not in self.without:
            for own in self.pending.values():
                own.fenced = True

    def before_atomic(self, addresses: np.ndarray, releases: bool) -> None:
        """Publishes what an atomic is ordered behind: stores to its own place, and with a release all
        that a barrier has fenced."""
        here = {int(address) for address in addresses.flat}
        released = releases and "release" not in self.without
        self.publish(a for a, own in self.pending.items() if a in here or (released and own.fenced))

    def after_atomic(self, acquires: bool) -> None:
        if acquires and "acquire" not in self.without:
            self.acquired = self.memory.time

    def publish_some(self) -> None:
        chance = self.memory.random
        if self.pending and chance.random() < 0.3:
            self.publish(address for address in self.pending if chance.random() < 0.5)

    def publish(self, addresses: Iterable[int]) -> None:
        """Makes stores seen by all."""
        by_dtype: dict[np.dtype, list[int]] = {}
        for address in list(addresses):
            by_dtype.setdefault(self.pending[address].value.dtype, []).append(address)
        for dtype, places in by_dtype.items():
            values = np.array([self.pending.pop(place).value for place in places], dtype)
            pointers, always = np.array(places, np.uint64), np.ones(len(places), bool)
            for place, before in zip(
                places, raw.load(pointers, always, np.zeros_like(values), dtype), strict=True
            ):
                self.memory.remember(place, before)
                self.floor[place] = self.memory.time
            raw.store(pointers, values, always)
