"""Checkpoints of models with int8 weights: safetensors, in shards, read without a float copy.

The files hold what ``state_dict`` gives (``int8fx/weights/state_dict.py``), so every tool that reads
safetensors reads them. ``load_checkpoint`` looks at all of it before it changes anything.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from int8fx.arguments import check_module
from int8fx.errors import CheckpointError
from int8fx.torch_private import persistent_tensors
from int8fx.weights.state_dict import check, check_schemes, checks_on_load, is_in, keys_of

INDEX = "model.safetensors.index.json"


def save_checkpoint(
    model: nn.Module, directory: str | Path, *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes ``model.safetensors``, or shards of at most ``max_shard_size`` and their index.

    Raises:
        TypeError: names what was given in the place of a module.
        CheckpointError: a tensor is on the meta device, as those that accelerate offloaded are.

    Examples:
        >>> import int8fx, pathlib, tempfile, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> model = int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> int8fx.save_checkpoint(model, folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['model.safetensors']
    """
    check_module(model, "save_checkpoint")
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name}: on the meta device (offloaded?), there are no values to write"
            )
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, directory, max_shard_size=max_shard_size)


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads a checkpoint into a model on which ``quantize_`` was called.

    A model on the meta device gets its tensors as they are read, and never holds a float copy::

        with torch.device("meta"):
            model = Model()
        load_checkpoint(int8fx.quantize_(model), "checkpoint")

    Float weights in the checkpoint are quantised one by one.

    Args:
        path: a safetensors file, or the directory that ``save_checkpoint`` wrote.

    Returns:
        The model.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or damaged; it is named,
            and the model is as it was.
        FileNotFoundError: there is no checkpoint at ``path``.
        TypeError: names what was given in the place of a module.

    Examples:
        >>> import int8fx, tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> model = int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> int8fx.save_checkpoint(model, folder)
        >>> other = int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> _ = int8fx.load_checkpoint(other, folder)
        >>> bool((other[0].weight.dequantize() == model[0].weight.dequantize()).all())
        True
    """
    check_module(model, "load_checkpoint")
    tensors: dict[str, Tensor] = {}
    for file in _files(Path(path)):
        tensors.update(_read(file))
    check_schemes(persistent_tensors(model), tensors)
    tied = _check_names(model, tensors)
    if not checks_on_load(model):  # it was never quantised
        check(model, tensors)
    on_meta = any(tensor.is_meta for _, tensor in persistent_tensors(model))
    if on_meta:
        # What is assigned must not stay a view of the file; int8 weights are packed, and are none.
        for name, tensor in tensors.items():
            if tensor.dtype != torch.int8:
                tensors[name] = tensor.clone()
    model.load_state_dict(tensors, strict=False, assign=on_meta)
    for name, source in tied.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(source))
    return model


def _files(path: Path) -> list[Path]:
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


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        header(file)
        raise CheckpointError(f"{file}: {error}") from error


def header(file: Path) -> dict[str, Any]:
    """What a safetensors file says that it holds; no tensor is read.

    Raises:
        CheckpointError: the file ends before what it says that it holds; names the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if size < max(start, 8):
            raise CheckpointError(f"{file}: broken off in its header")
        try:
            entries = json.loads(opened.read(start - 8))
            entries.pop("__metadata__", None)
            ends = sorted((entry["data_offsets"][1], name) for name, entry in entries.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: its header is damaged") from error
    for end, name in ends:
        if start + end > size:
            raise CheckpointError(f"{file}: broken off in {name}")
    return entries


def _check_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The names that the checkpoint leaves out, as it holds their tensor under another.

    Raises:
        CheckpointError: names what is missing or unexpected.
    """
    expected = dict(persistent_tensors(model))
    known = {key for name, tensor in expected.items() for key in keys_of(name, tensor)}
    unexpected = sorted(tensors.keys() - known)
    if unexpected:
        raise CheckpointError(f"{unexpected[0]}: in the checkpoint, and not in the model")
    by_tensor: dict[int, list[str]] = defaultdict(list)
    for name, tensor in expected.items():
        by_tensor[id(tensor)].append(name)
    tied: dict[str, str] = {}
    for names in by_tensor.values():
        present = [name for name in names if is_in(tensors, name, expected[name])]
        if not present:
            raise CheckpointError(f"{names[0]}: in the model, and missing in the checkpoint")
        tied |= {name: present[0] for name in names if name is not present[0]}
    return tied
