"""Memory for packed weights, on huge pages where the system has them.

A decode step reads every weight once, in order: with pages of 4 KiB it misses the TLB all the time.
Two cores of Zen 4 then read a weight of 4096 x 4096 at 26 to 32 GB/s, and at 41 on huge pages. Small
weights share chunks, so that they are on huge pages too. Each is a storage of its own on pages of its
own, which go back to the system with it; the chunk's addresses go with its last one.
"""

import contextlib
import ctypes
import mmap
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from int8fx.kernels.forks import free_in_children

CHUNK_BYTES = 32 << 20

_lock = free_in_children(threading.Lock())
_chunk: mmap.mmap | None = None
_used = 0


def empty(*shape: int) -> Tensor:
    """An int8 tensor, contiguous and aligned to a cache line."""
    size = torch.Size(shape).numel()
    # What is smaller than a page would leave most of it empty.
    if size < mmap.PAGESIZE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.int8)
    chunk, offset = _take(size)
    memory = memoryview(chunk)[offset : offset + size]
    # The storage holds this view, and drops it when its last tensor goes.
    weakref.finalize(memory, _give_back, chunk, offset, size).atexit = False
    return torch.frombuffer(memory, dtype=torch.int8).view(shape)


def _give_back(chunk: mmap.mmap, offset: int, size: int) -> None:
    length = _whole_pages(size)
    # A huge page that neighbours are on would be put together again, with zeros.
    with contextlib.suppress(OSError):
        chunk.madvise(mmap.MADV_NOHUGEPAGE, offset, length)
    chunk.madvise(mmap.MADV_DONTNEED, offset, length)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def trim_heap() -> None:
    """Gives free memory back to the system, where the C library can (glibc).

    Temporaries of many megabytes between small tensors that stay leave holes, which would add up to
    the size of a second model while one is quantised weight by weight.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_mapped(tensor: Tensor) -> None:
    """Takes a tensor that is mapped from a file, and was not written to, out of resident memory.

    Nothing is lost: what is read again comes from the file again. A tensor in memory of its own stays
    as it is, and so does everything where the system has no ``/proc``.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.device.type == "cpu" and tensor.is_contiguous() and _is_of_a_file(start, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), end - start, mmap.MADV_DONTNEED)


def _is_of_a_file(start: int, end: int) -> bool:
    """Whether one mapping of a file covers all memory from ``start`` to ``end``, which is some."""
    maps = Path("/proc/self/maps")
    if end <= start or not maps.exists():
        return False
    for line in maps.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last:
            return inode != "0"
    return False


def _take(size: int) -> tuple[mmap.mmap, int]:
    global _chunk, _used
    with _lock:
        if _chunk is None or _used + size > len(_chunk):
            _chunk, _used = _map(max(_whole_pages(size), CHUNK_BYTES)), 0
        offset = _used
        _used += _whole_pages(size)
        return _chunk, offset


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them serves small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
