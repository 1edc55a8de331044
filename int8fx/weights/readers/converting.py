"""One format to another, module by module: ``int8fx convert``. No more than a shard is in memory.

| to | is |
|---|---|
| ``int8fx`` | the same numbers in int8fx's own form |
| ``compressed-tensors`` | the same numbers, where these have whole zero points |
| ``int8`` | int8 by channel of int8fx, of the de-quantised weights: ``llm.int8`` |
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from int8fx.errors import CheckpointError
from int8fx.kernels.schemes.table import DEFAULT, OF_FILES, scheme_named
from int8fx.weights import state_dict
from int8fx.weights.checkpoint_files import READER
from int8fx.weights.readers import as_compressed_tensors, storing, table
from int8fx.weights.readers.gguf_file import GgufFile
from int8fx.weights.readers.gguf_names import Renamed
from int8fx.weights.readers.loading import Checkpoint
from int8fx.weights.readers.neutral import Neutral
from int8fx.weights.readers.opening import opened
from int8fx.weights.readers.shards import LARGEST, ShardWriter
from int8fx.weights.tensor import QuantizedWeight

COMPRESSED, INT8 = "compressed-tensors", "int8"
TARGETS = (table.OURS, COMPRESSED, INT8)
# Tables whose rows are looked up: they stay in float.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_COPIED = (".json", ".txt", ".model", ".jinja")
_OF_WEIGHTS = ("config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json")

Update = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What was written; ``print`` it with rich, or take ``to_dict``.

    Attributes:
        modules: how many quantised weights.
        file_bytes: of all tensors.
    """

    source: str
    directory: str
    format: str
    to: str
    modules: int
    file_bytes: int

    def __rich__(self) -> Text:
        return Text(
            f"{self.modules} weights of {self.source} from {self.format} to {self.to}; its tensors in "
            f"{self.directory} take {self.file_bytes / 2**20:.1f} MiB"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: Path,
    directory: Path,
    to: str,
    config: Mapping[str, Any] | None = None,
    update: Update = lambda done, total: None,
    largest: int = LARGEST,
) -> Converted:
    """Writes ``directory``, whole or not at all.

    Args:
        source: a folder, or a file of safetensors or GGUF.
        directory: is not there yet.
        to: of ``TARGETS``.
        config: of the model; by default the source's ``config.json``.
        update: is told how many modules are done.
        largest: bytes of a shard.

    Raises:
        CheckpointError: the source is damaged, or the target cannot hold a weight of it.
        FileNotFoundError: there is no source.
    """
    container = opened(source)
    reader = table.reader_of(container)
    if reader is None:
        raise CheckpointError(
            f"{source}: no weights of another system; int8fx quantize takes float ones"
        )
    checkpoint = Checkpoint.of(
        Renamed(container) if isinstance(container, GgufFile) else container, reader
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=directory.parent))
    try:
        made = unfinished / directory.name
        made.mkdir()
        writer = ShardWriter(made, largest)
        settings = _write(checkpoint, to, writer, update)
        writer.close()
        _write_others(checkpoint, source, made, {**(config or container.config)}, settings)
        made.replace(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Converted(
        str(source), str(directory), reader.name, to, len(checkpoint.modules), writer.total
    )


def _write(checkpoint: Checkpoint, to: str, writer: ShardWriter, update: Update) -> dict[str, Any]:
    """The tensors; gives back ``quantization_config``."""
    groups: dict[str, Any] = {}
    for index, path in enumerate(checkpoint.modules):
        name = f"{path}.weight" if path else "weight"
        neutral = checkpoint.read(path)
        if path.rpartition(".")[2] in _EMBEDDINGS:
            writer.add(name, neutral.dequantized().to(torch.bfloat16))
        else:
            tensors, groups[path] = _entries(neutral, name, path, to)
            for entry, tensor in tensors.items():
                writer.add(entry, tensor)
        checkpoint.release(path)
        update(index + 1, len(checkpoint.modules))
    for name in checkpoint.plain:
        writer.add(name, checkpoint.container.tensor(name).clone())
    return _settings(groups, to)


def _entries(neutral: Neutral, name: str, path: str, to: str) -> tuple[dict[str, Any], Any]:
    if to == COMPRESSED:
        found, group = as_compressed_tensors.entries(neutral, name)
        return {f"{path}.{entry}" if path else entry: each for entry, each in found.items()}, group
    if to == INT8:
        choice = scheme_named(DEFAULT).choice()
        weight = QuantizedWeight.quantized(neutral.dequantized(), choice, False)
    else:
        weight = storing.quantized(neutral, torch.bfloat16, name)
    # The columns of a calibration are in the files, with each weight.
    return state_dict.entries(name, weight), {k: v for k, v in weight.options.items() if k != "columns"}


def _settings(groups: dict[str, Any], to: str) -> dict[str, Any]:
    if to == COMPRESSED:
        return as_compressed_tensors.configuration(groups)
    options = next(iter(groups.values()))
    if options["scheme"] in OF_FILES:
        raise CheckpointError(
            f"{next(iter(groups))}: groups of rows, which int8fx's configuration cannot name; "
            f"convert to {INT8}, or int8fx.load_checkpoint the source"
        )
    for path, others in groups.items():
        if others != options:
            raise CheckpointError(
                f"{path}: {others}, and others {options}; int8fx's configuration has one setting for "
                f"all weights: convert to {COMPRESSED} or {INT8}, or int8fx.load_checkpoint the source"
            )
    return {"quant_method": table.OURS, **options}


def _write_others(
    checkpoint: Checkpoint, source: Path, made: Path, config: dict[str, Any], settings: dict[str, Any]
) -> None:
    """``config.json``, and what is beside the weights: tokenizers and the like."""
    config.pop("quanto_qmap.json", None)
    config["quantization_config"] = settings
    if settings["quant_method"] == table.OURS:
        # As the quantiser of transformers writes it: what does not know int8fx refuses the files.
        config["fusion_config"] = {READER: True}
    (made / "config.json").write_text(json.dumps(config, indent=2))
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        index = file.name.endswith(".index.json")
        if file.suffix in _COPIED and file.name not in _OF_WEIGHTS and not index:
            shutil.copyfile(file, made / file.name)
