"""Weights as they lie in a safetensors file: mapped into memory, and never copied.

A page of the file is in memory once, however many processes run it, and the machine may drop it and
read it again. Each tensor begins at a multiple of ``ALIGNMENT``, as the kernels want their operands.
The writer fills the gaps with tensors that nobody reads, since the format allows no gap.
"""

import ctypes
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8fx.errors import ArtefactError, CheckpointError
from int8fx.weights.checkpoint_files import whole_header

ALIGNMENT = 64
GAP = "int8fx.gap."  # names of tensors that fill a gap begin with it


@dataclass(frozen=True)
class DType:
    """A dtype of safetensors: torch's number for it, and its bytes."""

    number: int
    size: int


# The numbers are those of c10::ScalarType, which torch keeps from release to release.
DTYPES = {
    "U8": DType(0, 1),
    "I8": DType(1, 1),
    "I16": DType(2, 2),
    "I32": DType(3, 4),
    "I64": DType(4, 8),
    "F16": DType(5, 2),
    "F32": DType(6, 4),
    "F64": DType(7, 8),
    "BOOL": DType(11, 1),
    "BF16": DType(15, 2),
}


@dataclass(frozen=True)
class Memory:
    """A tensor in memory that somebody else keeps; contiguous.

    Attributes:
        address: of its first element.
        dtype: a name of ``DTYPES``.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size


class MappedFile:
    """The tensors of a safetensors file.

    Attributes:
        tensors: by name; they are there as long as this object.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        ArtefactError: the file is cut off or damaged; names it, and the tensor.
        """
        entries, start = _header(path)
        with path.open("rb") as file:
            # Private: a write would be this process's own, and there is none.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + start
        self.tensors = {
            name: Memory(first + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
            for name, entry in entries.items()
            if not name.startswith(GAP)
        }


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file holds, and where its data begins."""
    try:
        entries, start = whole_header(path)
    except CheckpointError as error:
        raise ArtefactError(str(error)) from error
    entries.pop("__metadata__", None)
    there = path.stat().st_size - start
    for name, entry in entries.items():
        try:
            _check(path, name, entry, there)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{path}: its header is damaged") from error
    return entries, start


def _check(path: Path, name: str, entry: Mapping[str, Any], there: int) -> None:
    begin, end = entry["data_offsets"]
    needed = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].size
    if not 0 <= begin <= end or end - begin != needed:
        raise ArtefactError(f"{path}: damaged: {name} has {end - begin} bytes, and needs {needed}")
    if end > there:
        raise ArtefactError(f"{path}: broken off in {name}")


class Zeros:
    """Memory of zeros, which takes pages of the machine as it is written to."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, 1))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)


Content = tuple[str, tuple[int, ...], bytes | memoryview]


def write_file(path: Path, tensors: Mapping[str, Content]) -> None:
    """Writes tensors as ``(dtype, shape, bytes)``, each at a multiple of ``ALIGNMENT``.

    Raises:
        OSError: it cannot be written.
    """
    entries, position = {}, 0
    for name, (dtype, shape, content) in _with_gaps(tensors):
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(content)],
        }
        position += len(content)
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, (_, _, content) in _with_gaps(tensors):
            file.write(content)


def _with_gaps(tensors: Mapping[str, Content]) -> Iterator[tuple[str, Content]]:
    for number, (name, described) in enumerate(tensors.items()):
        yield name, described
        if gap := -len(described[2]) % ALIGNMENT:
            yield f"{GAP}{number}", ("U8", (gap,), bytes(gap))
