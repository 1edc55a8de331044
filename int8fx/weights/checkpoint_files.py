"""Which files a checkpoint consists of, and what their headers say."""

import json
from pathlib import Path
from typing import Any

from int8fx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_METADATA = "__metadata__"
# transformers skips a quantisation that it does not know, and loads the files as if they were float.
# A fusion that it does not know it refuses, whatever its caller allows: ``Unknown fusion type: ...``.
# So ``config.json`` asks for one, which int8fx's quantiser takes out again before it is looked up.
READER = "the weights are int8 of int8fx; to read them, pip install int8fx and import int8fx"


def files_of(path: Path) -> list[Path]:
    """A file itself; of a folder the shards that its index names, or ``model.safetensors``.

    Raises:
        CheckpointError: the index is damaged, or names a file elsewhere.
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.is_file():
        return _shards(index)
    single = path / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"neither {single.name} nor {INDEX} in {path}")
    return [single]


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them in its folder.

    Raises:
        CheckpointError: it is damaged, or names a file elsewhere: names the file, and the entry.
        FileNotFoundError: it names a file that is not there.
    """
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = {shard: name for name, shard in sorted(places.items(), reverse=True)}
        files = {shard: index.parent / shard for shard in sorted(shards)}
        real = {shard: file.resolve() for shard, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged: no 'weight_map' of names to files") from error
    # In the cache of huggingface_hub, index and shards are links into one folder of blobs.
    folders = index.parent.resolve(), index.resolve().parent
    for shard, file in files.items():
        if not any(real[shard].is_relative_to(folder) for folder in folders):
            raise CheckpointError(
                f"{index}: the entry {shards[shard]!r} names {shard!r}, a file outside its folder"
            )
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {shard}, which is not there")
    return list(files.values())


def header(file: Path) -> dict[str, Any]:
    """What a safetensors file says that it holds; no tensor is read.

    Raises:
        CheckpointError: the file ends before what it says that it holds; names the tensor.
    """
    entries, start = whole_header(file)
    entries.pop(_METADATA, None)
    try:
        ends = sorted((entry["data_offsets"][1], name) for name, entry in entries.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its header is damaged") from error
    size = file.stat().st_size
    for end, name in ends:
        if start + end > size:
            raise CheckpointError(f"{file}: broken off in {name}")
    return entries


def start_of_tensors(file: Path) -> int:
    """The byte that the offsets of its header count from."""
    return whole_header(file)[1]


def metadata(file: Path) -> dict[str, Any]:
    """What it says beside its tensors.

    Raises:
        CheckpointError: its header is damaged.
    """
    found = whole_header(file)[0].get(_METADATA) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: its header is damaged")
    return found


def whole_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of itself, ``__metadata__`` too, and where its tensors begin.

    Raises:
        CheckpointError: the file is cut off in its header, or that is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if size < max(start, 8):
            raise CheckpointError(f"{file}: broken off in its header")
        try:
            entries = json.loads(opened.read(start - 8))
        except ValueError as error:
            raise CheckpointError(f"{file}: its header is damaged") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: its header is damaged")
    return entries, start
