"""Where tensors lie in memory, and which of them share some.

Addresses and not storages: a numpy or dlpack alias is another storage of the same memory.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class AddressRange(NamedTuple):
    """The addresses between which a tensor lies; none has ``start == end``."""

    device: torch.device
    start: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> "AddressRange":
        return cls(tensor.device, tensor.data_ptr(), tensor.data_ptr() + _extent(tensor))


def has_memory(tensor: Tensor) -> bool:
    """Whether it is a plain tensor, all of which is in its storage."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    try:
        begins = tensor.storage_offset() * tensor.element_size()
        return begins + _extent(tensor) <= tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # of nested tensors, and inside of torch.func
        return False


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element's first to its last element's last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def merged(ranges: Iterable[tuple[AddressRange, T]]) -> list[tuple[AddressRange, list[T]]]:
    """What lies in ranges that overlap, directly or by way of others, and the range of them all."""
    found: list[tuple[AddressRange, list[T]]] = []
    for place, each in sorted(ranges, key=lambda pair: (str(pair[0].device), *pair[0][1:])):
        if found and place.device == found[-1][0].device and place.start < found[-1][0].end:
            whole, inside = found[-1]
            found[-1] = whole._replace(end=max(whole.end, place.end)), [*inside, each]
        else:
            found.append((place, [each]))
    return found


class AddressRanges:
    """Several, to be asked whether another one overlaps with any."""

    def __init__(self, ranges: Iterable[AddressRange]) -> None:
        self._by_device: dict[torch.device, list[AddressRange]] = defaultdict(list)
        for whole, _ in merged((each, None) for each in ranges if each.start < each.end):
            self._by_device[whole.device].append(whole)

    def overlap(self, other: AddressRange) -> bool:
        mine = self._by_device.get(other.device, [])
        before = bisect_left(mine, other.end, key=lambda each: each.start) - 1
        return before >= 0 and other.start < min(other.end, mine[before].end)
