"""The container of GGUF: a header with metadata, descriptions of tensors, and their bytes.

    "GGUF", version uint32 (2 or 3), tensors uint64, metadata uint64
    metadata     key, type uint32, value; a string is its length uint64 and its bytes
    tensors      name, dimensions uint32, each uint64 with the contiguous one first, type uint32, offset
                 uint64 from the first byte of data, which is aligned to ``general.alignment``

All of it is checked against the file's size before a tensor is read. Source: ggml's ``gguf.md``.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int8fx.errors import CheckpointError
from int8fx.weights.readers.container import Entry
from int8fx.weights.readers.gguf import BLOCKS
from int8fx.weights.readers.mapped import MappedFile

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


class _Header:
    """Reads one after another, and never beyond the end."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise CheckpointError(f"{self.file}: broken off in its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if count > len(self.data) - self.at:  # each takes a byte at least
                raise CheckpointError(f"{self.file}: broken off in its header")
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self.file}: its header is damaged: a value of type {kind}")
        return self.number(_NUMBERS[kind])


@dataclass
class GgufFile:
    """A GGUF file. The rows of a quantised tensor are its blocks' bytes, ``[N, bytes]`` uint8."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    _starts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.stat().st_size < 24:
            raise CheckpointError(f"{self.path}: broken off in its header")
        self._mapped = MappedFile(self.path)
        data = self._mapped.data
        self.config = {"quantization_config": {"quant_method": "gguf"}}
        header = _Header(self.path, data)
        if header.bytes(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: no GGUF file: it does not begin with these letters")
        version = header.number("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path}: version {version}; read: {_VERSIONS}, little-endian")
        tensors, values = header.number("Q"), header.number("Q")
        for _ in range(values):
            key = header.text()
            self.metadata[key] = header.value(header.number("I"))
        described = [self._described(header) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment = {alignment!r}; a power of 2 expected"
            )
        first = -(-header.at // alignment) * alignment
        for name, entry, offset in described:
            self._place(name, entry, first + offset)

    def _described(self, header: _Header) -> tuple[str, Entry, int]:
        name, count = header.text(), header.number("I")
        if count > _MOST_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {name}: {count} dimensions")
        shape = tuple(header.number("Q") for _ in range(count))[::-1]
        number, offset = header.number("I"), header.number("Q")
        kind = _TYPES.get(number, f"type {number}")
        return name, Entry(self.path, kind, shape, self._bytes_of(name, kind, shape)), offset

    def _bytes_of(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        """Of a type that is not read 0: whoever asks for the tensor is told."""
        count = math.prod(shape)
        if kind in FLOATS:
            return count * FLOATS[kind].itemsize
        if kind not in BLOCKS:
            return 0
        block = BLOCKS[kind]
        if not shape or shape[-1] % block.weights:
            what = f"rows of {shape[-1:]} weights, no multiple of {block.weights}"
            raise CheckpointError(f"{self.path}: {name}: {what}")
        return count // block.weights * block.bytes

    def _place(self, name: str, entry: Entry, start: int) -> None:
        if name in self.entries:
            raise CheckpointError(f"{self.path}: {name} is there twice")
        if start + entry.nbytes > len(self._mapped.data):
            raise CheckpointError(f"{self.path}: broken off in {name}")
        self.entries[name], self._starts[name] = entry, start

    def tensor(self, name: str) -> Tensor:
        entry, start = self.entries[name], self._starts[name]
        if entry.dtype in FLOATS:
            return self._mapped.tensor(start, FLOATS[entry.dtype], entry.shape)
        if entry.dtype not in BLOCKS:
            read = ", ".join((*FLOATS, *BLOCKS))
            raise CheckpointError(f"{self.path}: {name}: {entry.dtype}; read: {read}")
        rows, row = entry.shape[:-1], entry.nbytes // max(1, math.prod(entry.shape[:-1]))
        return self._mapped.tensor(start, torch.uint8, (*rows, row))

    def release(self, name: str) -> None:
        self._mapped.release()
