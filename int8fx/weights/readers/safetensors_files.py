"""A container of safetensors: a folder of shards with an index, or one file.

Nothing but the folder's own files is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8fx.errors import CheckpointError
from int8fx.kernels.cpu import pages
from int8fx.weights import checkpoint_files
from int8fx.weights.readers import quanto
from int8fx.weights.readers.container import Entry

# Where older files have their settings, and of which method.
_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass
class Safetensors:
    """A folder of shards with an index, or one file."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    _opened: dict[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in checkpoint_files.files_of(self.path):
            for name, said in checkpoint_files.header(file).items():
                if name in self.entries:
                    raise CheckpointError(f"{file}: {name} is in {self.entries[name].file}, too")
                self.entries[name] = _entry(file, name, said)
            self.metadata |= checkpoint_files.metadata(file)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.config = _json(folder / "config.json")
        for name, method in _CONFIGS.items():
            if "quantization_config" not in self.config and (folder / name).is_file():
                self.config["quantization_config"] = {"quant_method": method} | _json(folder / name)
        if (folder / quanto.MAP).is_file():
            self.config[quanto.MAP] = _json(folder / quanto.MAP)

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        try:
            if entry.file not in self._opened:
                self._opened[entry.file] = safe_open(entry.file, framework="pt")
            return self._opened[entry.file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{entry.file}: {name}: {error}") from error

    def release(self, name: str) -> None:
        pages.release_mapped(self.tensor(name))


def _entry(file: Path, name: str, said: Mapping[str, Any]) -> Entry:
    try:
        start, end = said["data_offsets"]
        shape = tuple(int(size) for size in said["shape"])
        return Entry(file, str(said["dtype"]), shape, end - start)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its header is damaged: {name}") from error


def _json(file: Path) -> dict[str, Any]:
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
