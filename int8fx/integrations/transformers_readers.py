"""Other systems' files through transformers: ``from_pretrained`` of GPTQ, AWQ and others by int8fx.

    model = AutoModelForCausalLM.from_pretrained("a-gptq-model")

transformers leaves each format to the package of its owner, or reads it itself, in float where it has
no kernel. Where it can do neither on this machine, int8fx reads the files (``serves``), straight into
packed weights. ``read_with_int8fx`` makes int8fx read the others as well.

A folder of quanto's says in ``quanto_qmap.json`` alone what it is (``tell_of_quanto``). GGUF files have
a quantiser of their own (``int8fx/integrations/transformers_gguf.py``).

The model is then as one that ``quantize_`` made: it compiles, trains adapters, and is saved as
int8fx's.
"""

import contextlib
import importlib.util
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from int8fx.errors import CheckpointError
from int8fx.integrations import transformers as ours
from int8fx.kernels.cpu import pages
from int8fx.kernels.schemes.table import OF_FILES
from int8fx.weights import state_dict
from int8fx.weights.checkpoint_files import header, metadata
from int8fx.weights.quantize import dequantize_
from int8fx.weights.readers import quanto, storing, table
from int8fx.weights.readers.activations import scale_activation
from int8fx.weights.readers.loading import SCALED
from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.safetensors_files import read_json
from int8fx.weights.readers.settings import Config
from int8fx.weights.sites import keeps_transposed, linear_kinds
from int8fx.weights.tensor import QuantizedWeight

log = logging.getLogger(__name__)

METHOD = "int8fx-reader"
# What transformers needs to read each method's files. Those of fp8, mxfp4 and gguf it reads in float
# where it has no kernel, and those of quanto not at all.
A_GPU, NOTHING_READS = "a GPU", "nothing reads"
OWNERS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("gptqmodel", "optimum.gptq"),
    "awq": ("gptqmodel",),
    "bitsandbytes_4bit": ("bitsandbytes", "accelerate"),
    "bitsandbytes_8bit": ("bitsandbytes", "accelerate"),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("kernels", A_GPU),
    "hqq": ("hqq",),
    "quanto": (NOTHING_READS,),
    "torchao": ("torchao",),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate",),
    "gguf": ("accelerate",),
}
_preferred: set[str] = set()


def read_with_int8fx(*methods: str) -> None:
    """From now on ``from_pretrained`` reads files of these methods by int8fx, whoever else could.

    Args:
        methods: names of ``OWNERS``; none: all.

    Raises:
        ValueError: there is no such method; names those that there are.

    Examples:
        >>> from int8fx.integrations.transformers_readers import read_with_int8fx
        >>> read_with_int8fx("gptq", "awq")
    """
    unknown = set(methods) - OWNERS.keys()
    if unknown:
        raise ValueError(f"read_with_int8fx: {min(unknown)!r}; allowed: {', '.join(OWNERS)}")
    _preferred.update(methods or OWNERS)


@contextlib.contextmanager
def reading(*methods: str) -> Iterator[None]:
    """The same inside of a ``with``."""
    before = set(_preferred)
    read_with_int8fx(*methods)
    try:
        yield
    finally:
        _preferred.intersection_update(before)


def serves(method: str) -> bool:
    """Whether int8fx reads files of a method: it was asked to, or nobody else can."""
    return method in _preferred or not all(map(_is_there, OWNERS[method]))


def _is_there(need: str) -> bool:
    if need == NOTHING_READS:
        return False
    if need == A_GPU:
        return torch.cuda.is_available()
    try:
        return importlib.util.find_spec(need) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def config_of(method: str, theirs: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """The quantisation configuration of a file: ours, or that of transformers' class ``theirs``."""
    if not serves(method):
        return theirs.from_dict(config, *args, **kwargs)
    return ReaderConfig.from_dict(config, *args, **kwargs)


def tell_of_quanto(config: Any, file: str) -> None:
    """Puts quanto's map of modules into a model's configuration, where transformers looks.

    Raises:
        CheckpointError: the map is damaged.
    """
    config.quantization_config = {"quant_method": "quanto", quanto.MAP: read_json(Path(file))}


class ReaderConfig(QuantizationConfigMixin):
    """A file's ``quantization_config``, whatever it holds.

    Raises:
        CheckpointError: an option is not read.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = METHOD
        self.values = {name: _plain(value) for name, value in values.items()}
        method = self.values.get("quant_method", "bitsandbytes")
        self.reader = next(reader for reader in table.READERS if reader.method == method)
        self.settings = self.reader.settings(self._of_file())

    def _of_file(self) -> Config:
        if self.reader.name == "quanto":
            return Config(self.values.get(quanto.MAP) or {}, quanto.MAP)
        return Config(self.values)

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        found = cls(**config_dict)
        return (found, kwargs) if return_unused_kwargs else found

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def _plain(value: Any) -> Any:
    """Enumerations of transformers' as the files have them."""
    return getattr(value, "value", value)


class ReaderQuantizer(HfQuantizer):
    """What transformers asks while it reads the files; see ``transformers.quantizers.HfQuantizer``."""

    quantization_config: ReaderConfig
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: ReaderConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.entries: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}  # of the files' headers
        self.paths: frozenset[str] = frozenset()  # of the modules that they hold
        self.maps_files = False
        self.errors: list[CheckpointError] = []
        self.no_option = False

    def is_serializable(self) -> bool:
        """Not of a scheme that no configuration names."""
        return not self.no_option

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        """Raises:
        ValueError: weights are to stay on disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "files of other systems are read into memory: leave 'disk' out of device_map"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **_: Any
    ) -> None:
        """Raises:
        CheckpointError: a file is broken off, is a pickle, holds no module of its format, or holds one
            of experts that the model has in one batch.
        ValueError: weights are to be read in shards.
        """
        self.refuse_shards(model)
        files = [Path(file) for file in checkpoint_files or ()]
        self.maps_files = bool(files)
        for file in files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file}: a pickle, which can run code; safetensors are read")
            self.entries |= header(file)
            self.metadata |= metadata(file)
        reader = self.quantization_config.reader
        self.paths = frozenset(table.modules_of(self.entries, reader))
        if files and not self.paths:
            raise CheckpointError(
                f"{files[0]}: no tensor of {reader.name}, which its configuration names"
            )
        _check_experts(model, self.paths, reader.name)
        if reader.name == "AWQ":
            _scale_activations(model, self.entries)

    def refuse_shards(self, model: Any) -> None:
        """Raises:
        ValueError: weights are to be read in shards.
        """
        if ours.is_in_shards(model):
            raise ValueError(
                "files of other systems cannot be read in shards (tp_plan, FSDP): int8fx convert --to "
                "compressed-tensors writes files that vLLM reads so"
            )

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Read}

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(list(self.patterns), "weight", [Read(self)])]

    @property
    def patterns(self) -> dict[str, str]:
        """Which names transformers gives to the reader, as patterns, and the entry that each finds."""
        entries = self.quantization_config.reader.entries
        names = dict.fromkeys(("weight", *entries))
        return {rf"(?<![^.]){re.escape(entry)}$": entry for entry in names}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises:
        CheckpointError: a weight could not be read.
        """
        if self.errors:
            raise self.errors[0]
        state_dict.check_on_load(model)
        weights = [p for p in model.parameters() if isinstance(p, QuantizedWeight)]
        options = [{k: v for k, v in weight.options.items() if k != "columns"} for weight in weights]
        # Saving would give weights the names that they were read under.
        conversions = getattr(model, "_weight_conversions", None) or ()
        model._weight_conversions = [each for each in conversions if not _reads(each)]
        self.no_option = any(each["scheme"] in OF_FILES for each in options)
        if self.no_option:
            return model
        # Where weights differ, save_pretrained says so: its configuration has one setting for all.
        model.hf_quantizer = None
        ours.quantized(model, options[0])
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize_(model, dtype)


def _check_experts(model: Any, paths: Iterable[str], name: str) -> None:
    """Raises:
    CheckpointError: the model has a module's weight in one batch of matrices, where transformers would
        leave out its scales, or all of it.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for path in paths:
        there = in_files(path, model.base_model_prefix, modules)
        parents = (there[:dot] for dot in range(len(there)) if there[dot] == ".")
        if there not in modules and any(_has_batch(modules.get(parent)) for parent in parents):
            raise CheckpointError(
                f"{path}: {name} of an expert, whose weights the model has in one batch of matrices; "
                "read: weights that are matrices"
            )


def in_files(name: str, prefix: str, names: Collection[str]) -> str:
    """What a name is among others, where one of the two is of the model without its head."""
    others = (name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((other for other in others if name not in names and other in names), name)


def _float(name: str, tensor: Tensor) -> Tensor:
    """Raises:
    CheckpointError: it is in float8, which says nothing without its scales.
    """
    if tensor.element_size() == 1:
        raise CheckpointError(f"{name}: {tensor.dtype} without scales")
    return tensor


def _has_batch(module: nn.Module | None) -> bool:
    return module is not None and any(each.dim() == 3 for each in module.parameters(recurse=False))


def _reads(conversion: Any) -> bool:
    return any(isinstance(operation, Read) for operation in getattr(conversion, "operations", ()))


def _scale_activations(model: Any, entries: Mapping[str, Any]) -> None:
    """Puts the modules that AWQ's scales belong to in the places of activations."""
    for path, module in list(model.named_modules()):
        if path + SCALED in entries and not list(module.parameters()):
            shape = entries[path + SCALED]["shape"]
            scale_activation(model, path, torch.ones(shape, device="meta"))


class Read(ConversionOps):
    """The entries of a module to its weight; a float ``weight`` stays what it is."""

    def __init__(self, hf_quantizer: ReaderQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> "Read":
        return self  # transformers copies it for each weight, and errors are to be found in one place

    @property
    def reverse_op(self) -> ConversionOps:
        return ours.AsItIs()

    def convert(  # type: ignore[override]
        self, input_dict: Any, model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        entries = self.hf_quantizer.patterns
        tensors = {entries[pattern]: ours.single(value) for pattern, value in input_dict.items()}
        like = model.get_parameter_or_buffer(full_layer_name)
        alone = tensors.get("weight")
        try:
            if tensors.keys() == {"weight"} and alone is not None and alone.is_floating_point():
                return {"weight": _float(full_layer_name, alone).to(like.dtype)}
            weight = self._weight(model, full_layer_name, tensors, like)
        except CheckpointError as error:
            # transformers would log it, and raise an error that names nothing.
            self.hf_quantizer.errors.append(error)
            return {"weight": like}
        self.release(full_layer_name, tensors)
        return {"weight": weight}

    def release(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Gives back the pages of what was read, which would count as ours until the last was."""
        if self.hf_quantizer.maps_files:
            for tensor in tensors.values():
                pages.release_mapped(tensor)
        pages.trim_heap()

    def stored(self, model: Any, name: str, tensors: dict[str, Tensor]) -> StoredModule:
        """The module of a weight, by the path that it has in the files."""
        quantizer = self.hf_quantizer
        path = in_files(name.rpartition(".")[0], model.base_model_prefix, quantizer.paths)
        return StoredModule(path, tensors, metadata=quantizer.metadata)

    def _weight(self, model: Any, name: str, tensors: dict[str, Tensor], like: Tensor) -> Tensor:
        config = self.hf_quantizer.quantization_config
        owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
        transposed = keeps_transposed(owner)
        shape = (like.shape[0], like.shape[1])
        module = self.stored(model, name, tensors)
        module = replace(module, shape=shape[::-1] if transposed else shape, kind=type(owner).__name__)
        neutral = config.reader.read(module, config.settings)
        if not any(isinstance(owner, kind) for kind in linear_kinds()):
            return neutral.dequantized().to(like.dtype)
        weight = storing.quantized(neutral, like.dtype, name, transposed)
        state_dict.attach(owner)
        stand_in = nn.Parameter(weight.on_meta(), requires_grad=False)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        owner.weight = stand_in
        return nn.Parameter(weight, requires_grad=False)
