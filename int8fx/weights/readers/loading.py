"""A foreign checkpoint into a model: what belongs to which module, and each weight read by its reader.

The files are looked at as a whole before a tensor is read. Weights are read one after another: of each,
its pages of the file and its unpacked integers are given back before the next.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.errors import CheckpointError
from int8fx.kernels.cpu import pages
from int8fx.weights.readers import gguf, quanto, storing, table
from int8fx.weights.readers.container import Container
from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Neutral
from int8fx.weights.readers.settings import Config
from int8fx.weights.sites import keeps_transposed, linear_kinds
from int8fx.weights.tensor import QuantizedWeight

log = logging.getLogger(__name__)

# What old files hold and models compute.
_COMPUTED = (".rotary_emb.inv_freq",)
SCALED = ".scales"  # of an activation that AWQ has scaled


@dataclass(frozen=True)
class Checkpoint:
    """What a foreign checkpoint holds.

    Attributes:
        modules: for each quantised module the full names of its entries.
        plain: the names of all other tensors.
    """

    container: Container
    reader: table.Reader
    settings: Any
    modules: Mapping[str, Mapping[str, str]]
    plain: tuple[str, ...]

    @classmethod
    def of(cls, container: Container, reader: table.Reader) -> "Checkpoint":
        """Raises:
        CheckpointError: an option of its configuration is not read.
        """
        settings = reader.settings(_config(container, reader))
        paths = _quantized_of(container, reader)
        modules = {path: dict(_entries(container, reader, path)) for path in paths}
        taken = {name for entries in modules.values() for name in entries.values()}
        left = (name for name in container.entries if name not in taken)
        return cls(
            container, reader, settings, modules, tuple(n for n in left if not n.endswith(_COMPUTED))
        )

    def stored(
        self, path: str, shape: tuple[int, int] | None = None, kind: str = "Linear"
    ) -> StoredModule:
        """The entries of a module, mapped from the file."""
        names = self.modules[path]
        first = next(iter(names.values()))
        metadata = self.container.metadata
        if self.reader.name == "GGUF":
            metadata = {gguf.TYPE: self.container.entries[names["weight"]].dtype}
        return StoredModule(
            path,
            {entry: self.container.tensor(name) for entry, name in names.items()},
            shape,
            kind,
            metadata,
            lambda entry: str(self.container.entries[names.get(entry, first)].file),
        )

    def read(self, path: str, shape: tuple[int, int] | None = None, kind: str = "Linear") -> Neutral:
        """The weight of a module, checked.

        Raises:
            CheckpointError: names the file, the tensor and what is wrong with it.
        """
        module = self.stored(path, shape, kind)
        first = next(iter(module.tensors))
        try:
            neutral = self.reader.read(module, self.settings)
        except CheckpointError:
            raise
        except ValueError as error:
            raise module.error(first, str(error)) from error
        if shape is not None and neutral.shape != shape:
            what = f"a weight {list(neutral.shape)} in the checkpoint, {list(shape)} in the model"
            raise module.error(first, what)
        return neutral

    def release(self, path: str) -> None:
        """Gives back the pages of a module's entries, which would count as ours to the end."""
        for name in self.modules[path].values():
            self.container.release(name)


def _config(container: Container, reader: table.Reader) -> Config:
    if reader.name == "quanto":
        return Config(container.config.get(quanto.MAP, {}), f"{container.path}: {quanto.MAP}")
    return table.config_of(container)


def _quantized_of(container: Container, reader: table.Reader) -> Iterable[str]:
    if reader.name != "GGUF":
        return table.modules_of(container.entries, reader)
    floats = ("F32", "F16", "BF16")
    quantized = (name for name, entry in container.entries.items() if entry.dtype not in floats)
    return [name.removesuffix(".weight") for name in quantized]


def _entries(container: Container, reader: table.Reader, path: str) -> Iterator[tuple[str, str]]:
    for entry in reader.entries:
        name = f"{path}.{entry}" if path else entry
        if name in container.entries:
            yield entry, name


# --- into a model ----------------------------------------------------------------------------------


@dataclass
class Weights:
    """What was read for a model, before any of it is put there.

    Attributes:
        quantized: by the full name of the weight.
        plain: tensors in float, by name.
        scaled: what an activation's output is divided by, by the path of its module.
    """

    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[str, Tensor] = field(default_factory=dict)


def names_of(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer that the checkpoint has values of, and the name of the first entry.

    A bias of zeros for a module that has none, which GPTQ's files may hold, and scales of activations
    are left out.
    """
    found = {name: name for name in checkpoint.plain}
    for path, entries in checkpoint.modules.items():
        found[f"{path}.weight" if path else "weight"] = next(iter(entries.values()))
        bias = f"{path}.bias" if path else "bias"
        if bias in found and _has_no_bias(model, path) and not checkpoint.container.tensor(bias).any():
            del found[bias]
    for path in scaled_activations(checkpoint, model):
        del found[path + SCALED]
    return found


def _has_no_bias(model: nn.Module, path: str) -> bool:
    module = _module(model, path)
    return module is not None and getattr(module, "bias", None) is None


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def scaled_activations(checkpoint: Checkpoint, model: nn.Module) -> list[str]:
    """The paths of modules that AWQ has put scales beside, and that have no parameters of their own."""
    if checkpoint.reader.name != "AWQ":
        return []
    paths = (name.removesuffix(SCALED) for name in checkpoint.plain if name.endswith(SCALED))
    modules = ((path, _module(model, path)) for path in paths)
    return [path for path, module in modules if module is not None and not list(module.parameters())]


def read_into(
    checkpoint: Checkpoint, model: nn.Module, names: Iterable[str], scheme: str | None = None
) -> Weights:
    """The weights of a model, each in the form that keeps it.

    Args:
        names: of the parameters and buffers, as ``names_of`` gives them.
        scheme: of all quantised linears, in the place of that which each format has.

    Raises:
        CheckpointError: names the file, the tensor and what is wrong with it.
    """
    weights, wanted = Weights(), set(names)
    for path in checkpoint.modules:
        name = f"{path}.weight" if path else "weight"
        module = model.get_submodule(path)
        _read_weight(checkpoint, path, name, module, weights, scheme)
        checkpoint.release(path)
        pages.trim_heap()
    for name in checkpoint.plain:
        if name in wanted:
            weights.plain[name] = _plain(checkpoint, name)
    for path in scaled_activations(checkpoint, model):
        weights.scaled[path] = checkpoint.container.tensor(path + SCALED).clone()
    return weights


def _plain(checkpoint: Checkpoint, name: str) -> Tensor:
    """Raises:
    CheckpointError: the tensor is in float8, which says nothing without its scales.
    """
    tensor = checkpoint.container.tensor(name)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        file = checkpoint.container.entries[name].file
        raise CheckpointError(f"{file}: {name}: {tensor.dtype} without scales")
    return tensor


def _read_weight(
    checkpoint: Checkpoint, path: str, name: str, module: nn.Module, into: Weights, scheme: str | None
) -> None:
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    if isinstance(parameter, QuantizedWeight):
        raise CheckpointError(
            f"{name}: {parameter.weight_format.name} in the model, and {checkpoint.reader.name} has a "
            "format of its own: give the model in float"
        )
    if parameter.dim() != 2:
        raise CheckpointError(f"{name}: of {parameter.dim()} dimensions in the model; read: matrices")
    transposed = keeps_transposed(module)
    shape = (parameter.shape[0], parameter.shape[1])
    neutral = checkpoint.read(path, shape[::-1] if transposed else shape, type(module).__name__)
    if isinstance(module, tuple(linear_kinds())):
        into.quantized[name] = storing.quantized(neutral, parameter.dtype, name, transposed, scheme)
        return
    log.info("%s: no linear: de-quantised", name)
    into.plain[name] = neutral.dequantized(torch.float32).to(parameter.dtype)
