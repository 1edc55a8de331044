"""Snapshots: what a list of tensors were at one time, and whether they still are that.

Of each tensor

- which one it is, and its state: its version (in-place edits count it up), its storage with address and
  size (``.data = `` brings another one), and where and how it lies in there: offset, shape, strides,
  dtype (``.data = `` may bring another view of the same one);
- samples of its content, for whatever is written behind torch's back. Only memory of a CPU is read:
  that of another device would have to be waited for. Up to 4 KiB in one piece are compared whole. Of
  a larger tensor there are 16 sets of 8 lines of 128 bytes, and a comparison says how many of the sets
  it reads (``kernels/cpu/samples.h``).

An update of a whole tensor is in every set. What moves a few elements may be in none.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.devices import host_reads
from int8fx.torch_private import storage_id, version_of
from int8fx.weights.memory import has_memory

State = tuple[Any, ...]

ALL_SETS = 16
SAMPLES = 4096  # elements, of the kind in Python


def state_of(tensor: Tensor) -> State:
    """What changes when a tensor's values may have, as far as torch knows."""
    stored = storage_id(tensor), tensor.untyped_storage().nbytes(), tensor.data_ptr()
    form = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_neg()
    return version_of(tensor), *stored, *form


class Snapshot:
    """Tensors, held by their identity alone.

    The owner drops it when one of them dies: another tensor may then get its address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._states: Any = [(id(tensor), *state_of(tensor)) for tensor in tensors]
        self._contents = [_content(tensor) for tensor in tensors]

    @classmethod
    def joined(cls, snapshots: Sequence["Snapshot"]) -> "Snapshot":
        """One of the tensors of all of them."""
        whole = cls(())
        whole._states = [state for each in snapshots for state in each._states]
        whole._contents = [content for each in snapshots for content in each._contents]
        return whole

    def matches(self, tensors: Sequence[Tensor], sets: int = ALL_SETS, first: int = 0) -> bool:
        """Whether these are the same tensors, unchanged.

        Args:
            sets: how many sets of samples are compared, of larger tensors; of those that have a
                gradient all are. 0: nothing is read of any.
            first: the number of the first one; behind the last comes the first again.
        """
        if self._states != [(id(tensor), *state_of(tensor)) for tensor in tensors]:
            return False
        return not sets or all(map(_same_content, tensors, self._contents))


class CompiledSnapshot(Snapshot):
    """The same in the compiled kernels: less than a microsecond a tensor instead of a hundred."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._states = torch.ops.int8fx.snapshot(tensors)

    @classmethod
    def joined(cls, snapshots: Sequence["Snapshot"]) -> "Snapshot":
        whole = cls(())
        whole._states = torch.ops.int8fx.joined([each._states for each in snapshots])
        return whole

    def matches(self, tensors: Sequence[Tensor], sets: int = ALL_SETS, first: int = 0) -> bool:
        return torch.ops.int8fx.unchanged(tensors, self._states, first, sets)


def snapshot(tensors: Sequence[Tensor]) -> Snapshot:
    """A snapshot of the fastest kind there is here."""
    return Snapshot(tensors) if cpu.load() else CompiledSnapshot(tensors)


# --- Content, without the compiled kernels -------------------------------------------------------

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _content(tensor: Tensor) -> Tensor | None:
    """The bits of elements spread over a tensor; None where its memory may not be read."""
    readable = has_memory(tensor) and host_reads(tensor.device) and not tensor.is_neg()
    if not readable or tensor.numel() == 0 or tensor.element_size() not in _BITS or tensor.is_complex():
        return None
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    return bits[_positions(tuple(tensor.shape))].clone()


def _same_content(tensor: Tensor, content: Tensor | None) -> bool:
    now = _content(tensor)
    return content is None or (now is not None and torch.equal(now, content))


@functools.lru_cache(maxsize=256)
def _positions(shape: tuple[int, ...]) -> Any:
    """An index of elements of a tensor: the first, the last, and random ones of equal parts."""
    numel = math.prod(shape)
    if numel <= SAMPLES or not shape:
        return ...
    with torch.inference_mode(False):
        within = torch.rand(SAMPLES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        flat = ((torch.arange(SAMPLES) + within) * (numel / SAMPLES)).long().clamp_(max=numel - 1)
        flat[0], flat[-1] = 0, numel - 1
        return torch.unravel_index(flat, shape)
