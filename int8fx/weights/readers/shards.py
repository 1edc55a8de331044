"""Writes a checkpoint tensor by tensor: shards of safetensors and their index, one shard in memory."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from int8fx.weights.checkpoint_files import INDEX

LARGEST = 5 * 10**9


class ShardWriter:
    """Puts tensors into files of at most ``largest`` bytes; ``close`` gives these their names."""

    def __init__(self, directory: Path, largest: int = LARGEST) -> None:
        self.directory, self.largest = directory, largest
        self._open: dict[str, Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._open and self._bytes + tensor.nbytes > self.largest:
            self._flush()
        self._open[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self.total += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._open, self._unnamed(len(self._files)), {"format": "pt"})
        self._files.append(list(self._open))
        self._open, self._bytes = {}, 0

    def _unnamed(self, index: int) -> Path:
        return self.directory / f"unfinished-{index}.safetensors"

    def close(self) -> None:
        if self._open:
            self._flush()
        if len(self._files) == 1:
            self._unnamed(0).replace(self.directory / "model.safetensors")
            return
        places: dict[str, str] = {}
        for index, names in enumerate(self._files):
            shard = f"model-{index + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._unnamed(index).replace(self.directory / shard)
            places |= dict.fromkeys(names, shard)
        said = {"metadata": {"total_size": self.total}, "weight_map": places}
        (self.directory / INDEX).write_text(json.dumps(said, indent=2))
