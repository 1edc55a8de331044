"""A container of safetensors: a folder of shards with an index, or one file.

Nothing but the folder's own files is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int8fx.errors import CheckpointError
from int8fx.weights import checkpoint_files
from int8fx.weights.readers import quanto
from int8fx.weights.readers.container import Entry, dtype_of
from int8fx.weights.readers.mapped import MappedFile

# Where older files have their settings, and of which method.
_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass
class Safetensors:
    """A folder of shards with an index, or one file."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    _starts: dict[str, int] = field(default_factory=dict)
    _mapped: dict[Path, MappedFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in checkpoint_files.files_of(self.path):
            start = checkpoint_files.start_of_tensors(file)
            for name, said in checkpoint_files.header(file).items():
                if name in self.entries:
                    raise CheckpointError(f"{file}: {name} is in {self.entries[name].file}, too")
                self.entries[name], offset = _entry(file, name, said)
                self._starts[name] = start + offset
            self.metadata |= checkpoint_files.metadata(file)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.config = read_json(folder / "config.json")
        for name, method in _CONFIGS.items():
            if "quantization_config" not in self.config and (folder / name).is_file():
                self.config["quantization_config"] = {"quant_method": method} | read_json(folder / name)
        if (folder / quanto.MAP).is_file():
            self.config[quanto.MAP] = read_json(folder / quanto.MAP)

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        dtype = dtype_of(entry)
        if torch.Size(entry.shape).numel() * dtype.itemsize != entry.nbytes:
            what = f"{entry.nbytes} bytes for {entry.dtype} of shape {list(entry.shape)}"
            raise CheckpointError(f"{entry.file}: {name}: damaged: {what}")
        return self._file(entry.file).tensor(self._starts[name], dtype, entry.shape)

    def _file(self, file: Path) -> MappedFile:
        if file not in self._mapped:
            self._mapped[file] = MappedFile(file)
        return self._mapped[file]

    def release(self, name: str) -> None:
        self._file(self.entries[name].file).release()


def _entry(file: Path, name: str, said: Mapping[str, Any]) -> tuple[Entry, int]:
    """And where it begins behind the header."""
    try:
        start, end = (int(offset) for offset in said["data_offsets"])
        shape = tuple(int(size) for size in said["shape"])
        found = Entry(file, str(said["dtype"]), shape, end - start)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its header is damaged: {name}") from error
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise CheckpointError(f"{file}: its header is damaged: {name}")
    return found, start


def read_json(file: Path) -> dict[str, Any]:
    """Raises:
    CheckpointError: the file is there, and holds no JSON of names to values.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: damaged: no JSON of names to values")
    return found
