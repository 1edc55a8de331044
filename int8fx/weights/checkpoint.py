"""Checkpoints of models with int8 weights: safetensors, in shards, read without a float copy.

The files hold what ``state_dict`` gives (``int8fx/weights/state_dict.py``), so every tool that reads
safetensors reads them. ``load_checkpoint`` looks at all of it before it changes anything.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from int8fx.arguments import AnyModule, check_module
from int8fx.errors import CheckpointError
from int8fx.torch_private import persistent_tensors
from int8fx.weights.checkpoint_files import files_of, header
from int8fx.weights.readers import loading, table
from int8fx.weights.readers.activations import scale_activation
from int8fx.weights.readers.container import Container
from int8fx.weights.readers.gguf_file import GgufFile
from int8fx.weights.readers.gguf_names import Renamed
from int8fx.weights.readers.opening import opened
from int8fx.weights.state_dict import (
    attach,
    check,
    check_on_load,
    check_schemes,
    checks_on_load,
    is_in,
    keys_of,
)


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


def load_checkpoint(model: AnyModule, path: str | Path, *, scheme: str | None = None) -> AnyModule:
    """Loads a checkpoint into a model, of int8fx or of another system.

    A checkpoint of int8fx needs a model on which ``quantize_`` was called. One on the meta device gets
    its tensors as they are read, and never holds a float copy::

        with torch.device("meta"):
            model = Model()
        load_checkpoint(int8fx.quantize_(model), "checkpoint")

    Float weights in the checkpoint are quantised one by one.

    A checkpoint of GPTQ, AWQ, bitsandbytes, compressed-tensors, GGUF and others (``docs/formats.md``)
    needs a float model, and brings its weights' formats along::

        with accelerate.init_empty_weights():  # buffers that no file holds are made
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("gptq-files"))
        model.tie_weights()
        load_checkpoint(model, "gptq-files")

    Args:
        path: a safetensors file, a directory of them with an index, or a GGUF file.
        scheme: of foreign weights' products, where another than the file's keeps the same numbers:
            ``"w4a8-group"`` in the place of ``"w4a16-group"``.

    Returns:
        The model.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or damaged; it is named,
            and the model is as it was. Or an option of the files is not read.
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
    container = opened(Path(path))
    reader = table.reader_of(container)
    if reader is not None and not (checks_on_load(model) and reader.name in _INTO_QUANTIZED):
        return _load_foreign(model, container, reader, scheme)
    if scheme is not None:
        raise CheckpointError(
            f"{path}: scheme={scheme!r} is for checkpoints of other systems; quantize_ takes it"
        )
    return _load(model, Path(path))


# Formats that a model takes that was quantised for them, as parts of its state_dict.
_INTO_QUANTIZED = ("ComfyUI", "bitsandbytes")


def _load(model: AnyModule, path: Path) -> AnyModule:
    tensors: dict[str, Tensor] = {}
    for file in files_of(path):
        tensors.update(_read(file))
    check_schemes(persistent_tensors(model), tensors)
    tied = _check_names(model, tensors)
    if not checks_on_load(model):  # it was never quantised
        check(model, tensors)
    _put(model, tensors, tied)
    return model


def _put(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
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


def _load_foreign(
    model: AnyModule, container: Container, reader: table.Reader, scheme: str | None
) -> AnyModule:
    if isinstance(container, GgufFile):
        container = Renamed(container)
    checkpoint = loading.Checkpoint.of(container, reader)
    names = loading.names_of(checkpoint, model)
    tied = _check_names(model, names)
    weights = loading.read_into(checkpoint, model, names, scheme)
    floats = _as_in_model(model, weights.plain)
    check(model, floats)
    # Nothing fails from here on.
    for name, weight in weights.quantized.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.weight = nn.Parameter(weight, requires_grad=False)
        attach(owner)
    _put(model, floats, tied)
    for path, scales in weights.scaled.items():
        scale_activation(model, path, scales)
    check_on_load(model)
    return model


def _as_in_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors in the dtype that the model has each in."""
    dtypes = {name: tensor.dtype for name, tensor in persistent_tensors(model)}
    return {
        name: tensor.to(dtypes[name])
        if tensor.is_floating_point() and dtypes[name].is_floating_point
        else tensor
        for name, tensor in tensors.items()
    }


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        header(file)
        raise CheckpointError(f"{file}: {error}") from error


def _check_names(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, str]:
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
