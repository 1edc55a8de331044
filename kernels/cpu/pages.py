"""Memory for packed weights, on huge pages where the system has them.

A decode step reads every weight once, in order: with pages of 4 KiB it misses the TLB all the time.
Two cores of Zen 4 then read a weight of 4096 x 4096 at 26 to 32 GB/s, and at 41 on huge pages. Small
weights share chunks, so that they are on huge pages too; each is a storage of its own, and a chunk
goes with its last one.
"""

import contextlib
import ctypes
import mmap
import threading

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
ALIGNMENT = 64
_MADV_PAGEOUT = 21  # Linux; mmap has no name for it

_lock = threading.Lock()
_chunk: mmap.mmap | None = None
_used = 0


def empty(*shape: int) -> Tensor:
    """An int8 tensor, contiguous and aligned to a cache line."""
    size = torch.Size(shape).numel()
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.int8)
    memory, offset = _take(size)
    return torch.frombuffer(memory, dtype=torch.int8, count=size, offset=offset).view(shape)


def release_mapped(tensor: Tensor) -> None:
    """Tells the system that the memory of a tensor that is mapped from a file is not needed soon.

    A hint that loses nothing: what is read again comes from the file again. Memory that is not of a
    file stays where it is.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.device.type == "cpu" and length > 0:
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if madvise is not None:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def _take(size: int) -> tuple[mmap.mmap, int]:
    global _chunk, _used
    with _lock:
        if _chunk is None or _used + size > len(_chunk):
            _chunk, _used = _map(max(size, CHUNK_BYTES)), 0
        offset = _used
        _used += -(-size // ALIGNMENT) * ALIGNMENT
        return _chunk, offset


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them serves small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
