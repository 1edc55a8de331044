"""Files of tensors, read one tensor at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from int8fx.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Container(Protocol):
    """The tensors of a checkpoint.

    Attributes:
        path: as it was given.
        entries: what the headers say, by name.
        config: ``config.json``, or what a file of one piece has in its place.
        metadata: of the headers.
    """

    path: Path
    entries: dict[str, Entry]
    config: dict[str, Any]
    metadata: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped into memory.

        Raises:
            CheckpointError: the file is damaged; names it and the tensor.
        """

    def release(self, name: str) -> None:
        """Gives back its pages, which would count as ours for as long as the file is open."""


def dtype_of(entry: Entry) -> torch.dtype:
    """Raises:
    CheckpointError: torch has no such dtype.
    """
    if entry.dtype not in _DTYPES:
        raise CheckpointError(f"{entry.file}: a tensor of {entry.dtype}, which torch has not")
    return _DTYPES[entry.dtype]
