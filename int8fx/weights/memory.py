"""Where tensors lie in memory, and which of them share some.

Addresses and not storages: a numpy or dlpack alias is another storage of the same memory.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


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


class AddressRanges:
    """Several, to be asked whether another one overlaps with any."""

    def __init__(self, memories: Iterable[AddressRange]) -> None:
        by_device: dict[torch.device, list[tuple[int, int]]] = defaultdict(list)
        for device, start, end in memories:
            if start < end:
                by_device[device].append((start, end))
        self._starts: dict[torch.device, list[int]] = {}
        self._furthest: dict[torch.device, list[int]] = {}  # end of all up to each
        for device, spans in by_device.items():
            spans.sort()
            self._starts[device] = [start for start, _ in spans]
            self._furthest[device] = list(accumulate((end for _, end in spans), max))

    def overlap(self, other: AddressRange) -> bool:
        before = bisect_left(self._starts.get(other.device, []), other.end) - 1
        return (
            before >= 0
            and other.start < other.end
            and self._furthest[other.device][before] > other.start
        )
