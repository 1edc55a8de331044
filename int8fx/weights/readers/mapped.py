"""A file mapped into memory, whose pages are given back on request."""

import mmap
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """Tensors in the memory of a file; nothing is copied, and nobody writes to them."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            # A private mapping, as torch asks for memory that could be written to.
            self.data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The one at a byte; the caller has checked that it lies within the file."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype, count=count, offset=start).view(shape)

    def release(self) -> None:
        """Gives back the pages that were read. They would count as ours for as long as the file is
        mapped, and so would those that the system maps around each."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED)
