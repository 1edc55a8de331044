"""int8fx as a quantiser of transformers::

    from int8fx.integrations.transformers import Int8FxConfig

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Int8FxConfig(threshold=6.0))
    model.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)

The last line needs no import: ``int8fx_autoload.py`` tells transformers of the format. Where int8fx is
not installed the same line raises a ``ValueError`` that names int8fx (``READER``).

Each weight is quantised as it is read, so memory peaks one weight above the int8 model. The files
that are written hold ``weight`` (int8) and ``weight_scale`` (``int8fx/weights/state_dict.py``). What a
``device_map`` leaves on the CPU for a GPU, or on disk, comes back whole
(``int8fx/integrations/accelerate.py``).
"""

import importlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from int8fx.errors import CheckpointError, ReleaseError
from int8fx.kernels.cpu import pages
from int8fx.kernels.schemes.scheme import Choice
from int8fx.options import Options, in_use
from int8fx.passes.linears.decision import Decision
from int8fx.weights import sharding, state_dict
from int8fx.weights.checkpoint_files import READER, header
from int8fx.weights.distributed import local
from int8fx.weights.expert_sites import expert_sites, quantize_experts
from int8fx.weights.quantize import (
    OPTIONS,
    decisions,
    dequantize_,
    warn_of_experts,
)
from int8fx.weights.sites import keeps_transposed
from int8fx.weights.tensor import QuantizedWeight

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.integrations.accelerate import get_device
except ImportError as error:
    raise ReleaseError("transformers", "5.17.0") from error

METHOD = "int8fx"


class Int8FxConfig(QuantizationConfigMixin):
    """The options of ``int8fx.quantize_``, in a model's ``config.json``.

    ``from_pretrained(..., quantization_config=Int8FxConfig())`` quantises each weight as it is read.

    Raises:
        ValueError: an option is unknown or out of range.

    Examples:
        >>> from int8fx.integrations.transformers import Int8FxConfig
        >>> Int8FxConfig(scheme="w8a16-group", group_size=32).to_dict()
        {'quant_method': 'int8fx', 'scheme': 'w8a16-group', 'group_size': 32}
    """

    def __init__(self, **options: Any) -> None:
        options.pop("quant_method", None)
        self.quant_method: Any = METHOD
        self.parsed = Options.parse(options, type(self).__name__, OPTIONS)
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        # The columns of a calibration are in the files, with each weight.
        written = {k: v for k, v in self.options.items() if k not in ("calibration", "columns")}
        return {"quant_method": METHOD, **written}

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every scheme that weights may have, and its settings but for the columns of a calibration."""
        return self.parsed.choices

    def choice_of(self, path: str, shape: tuple[int, int]) -> Choice:
        """That of a module's weight, with its columns.

        Args:
            shape: ``(N, K)``.

        Raises:
            CalibrationError: the calibration is of another model.
        """
        return self.parsed.calibrated(self.parsed.choice(path), path, shape)


class Int8FxQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves; see ``transformers.quantizers.HfQuantizer``."""

    quantization_config: Int8FxConfig
    quantized_element_size = 1
    is_trainable = True
    is_compileable = True
    names: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()  # batches of experts that the files may hold quantised
    in_files: dict[str, Any]
    device_map: dict[str, Any] | None = None
    maps_files = False  # whether the weights come from files that transformers maps, and no one else

    def __init__(self, quantization_config: Int8FxConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.in_files = {}

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]
        choices = self.quantization_config.choices
        names = {"weight", *(path.rpartition(".")[2] for path in self.experts)}
        return {name: state_dict.names_of_all(name, choices) for name in sorted(names)}

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        if device_map is not None:
            importlib.import_module("int8fx.integrations.accelerate")  # what serves it
        # transformers comes back with what it made of "auto".
        self.device_map = device_map if isinstance(device_map, dict) else None
        self._check_experts()

    def update_attn_implementation(self, config: Any) -> Any:
        """What transformers shows the configuration through, before anything is read."""
        _ask_for_reader(config, False)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same, and all that there is in 5.17."""
        return self.update_attn_implementation(config)

    def is_on_disk(self, name: str) -> bool:
        """Whether a parameter stays on disk, from where accelerate brings it for each call."""
        return self.device_map is not None and get_device(self.device_map, name) == "disk"

    def _check_experts(self) -> None:
        """Raises:
        ValueError: experts that the files hold quantised are to stay on disk.
        """
        for name in sorted(self.experts):
            if name + state_dict.SCHEME in self.in_files and self.is_on_disk(name):
                raise ValueError(
                    f"{name}: quantised experts are read into memory: leave 'disk' out of device_map"
                )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **_: Any
    ) -> None:
        """Raises:
        CheckpointError: a file is broken off; it is named, with the tensor where it ends.
        ValueError: nothing of the model can be quantised, int8 files are to be read in shards, or
            quantised experts are to stay on disk.
        """
        files = [Path(file) for file in checkpoint_files or ()]
        self.maps_files = bool(files)
        for file in files:
            if file.suffix == ".safetensors":
                self.in_files.update(header(file))
        if self.pre_quantized and is_in_shards(model):
            # transformers cuts what belongs to a weight as it cuts the weight, its scales as well.
            raise ValueError(
                "int8 files cannot be read in shards (tp_plan, FSDP): give the float checkpoint and "
                "quantization_config=Int8FxConfig(), and each process quantises its shard"
            )
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        found = decisions(model, **self.quantization_config.options)
        linears = [decision for decision in found if not decision.experts]
        names = {f"{decision.path}.weight" for decision in linears if decision.accepted}
        if self.pre_quantized:
            # A calibration, which is not in the configuration, had the head quantised as well.
            names |= {
                name for name in _linear_weights(linears) if name + state_dict.SCHEME in self.in_files
            }
            self.experts = frozenset(each.path for each in found if each.experts and each.accepted)
            self._check_experts()
        self.names = frozenset(names - tied)
        for decision in found:
            # A calibration of another model is an error before anything is read.
            if f"{decision.path}.weight" in self.names and decision.shape is not None:
                self.quantization_config.choice_of(decision.path, decision.shape)
        if not self.names:
            reasons = "".join(f"\n  {decision}" for decision in found)
            raise ValueError(f"no weight of {type(model).__name__} can be quantised{reasons}")
        warn_of_experts(model, found)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Deserialize}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How int8 files are read. Releases up to 5.20 do not know ``serialized_names``, and find a
        pattern anywhere in a name."""
        if not self.pre_quantized or hasattr(HfQuantizer, "serialized_names"):
            return super().get_weight_conversions()
        return [
            WeightConverter([f"{name}$" for name in names], target, [_Deserialize(self)])
            for target, names in self.serialized_names.items()
        ]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict]:
        """For saving: of a model with offloaded weights, brought back module by module; of one in
        shards, with its int8 weights put together in every process. With quantised experts all is
        written under the model's own names: transformers would cut a batch into a matrix an expert.

        Raises:
            ValueError: a weight has other options than the configuration, which holds one for all.
        """
        weights = [(name, local(parameter)) for name, parameter in model.named_parameters()]
        parsed = self.quantization_config.parsed
        state_dict.check_options(weights, lambda path: parsed.choice(path).options)
        if any(isinstance(weight, QuantizedWeight) and weight.batch for _, weight in weights):
            model._weight_conversions = []
        shards = {n: p for n, p in model.named_parameters() if p is not local(p)}
        if any(isinstance(local(parameter), QuantizedWeight) for parameter in shards.values()):
            state = model.state_dict()
            for name, parameter in shards.items():
                if isinstance(local(parameter), QuantizedWeight):
                    state |= state_dict.entries(name, sharding.whole(parameter))
            return state, {}
        if not any(parameter.is_meta for parameter in model.parameters()):
            return None, {}
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return get_state_dict_offloaded_model(model), {}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises:
        CheckpointError: int8 files of this class do not hold a weight, for which transformers made up
            numbers.
        """
        if not self.pre_quantized:
            parsed = self.quantization_config.parsed
            loaded = [site for site in expert_sites(model, parsed) if not site.weight.is_meta]
            deque(quantize_experts(loaded), maxlen=0)
        state_dict.check_on_load(model)
        _ask_for_reader(model.config, True)
        # Files of another class need not hold all of this one: a new head, a pooler.
        same_class = type(model).__name__ in (model.config.architectures or ())
        if self.pre_quantized and self.in_files and same_class:
            for name in sorted(self.names):
                if name not in self.in_files and not isinstance(
                    model.get_parameter(name), QuantizedWeight
                ):
                    raise CheckpointError(f"{name}: in the model, and missing in the checkpoint")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize_(model, dtype)  # which calls dequantized, below


# --- models that quantize_ changed ---------------------------------------------------------------


def quantized(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Makes each model of transformers in a module, the module itself among them, what from_pretrained
    would have made: ``save_pretrained`` writes files that ``from_pretrained`` reads."""
    for found in _models(model):
        if getattr(found, "hf_quantizer", None) is None:
            # Patterns are of paths in the module that was given, and of no use in the files of a part.
            own = options
            if found is not model:
                own = in_use({k: v for k, v in options.items() if k not in _PATTERNS})
            config = Int8FxConfig(**own)
            found.hf_quantizer = Int8FxQuantizer(config, pre_quantized=False)
            found.config.quantization_config = config
            _ask_for_reader(found.config, True)


def dequantized(model: nn.Module) -> None:
    """The way back."""
    for found in _models(model):
        if isinstance(getattr(found, "hf_quantizer", None), Int8FxQuantizer):
            found.hf_quantizer.remove_quantization_config(found)
            _ask_for_reader(found.config, False)
            if getattr(found, "_weight_conversions", None) == []:
                del found._weight_conversions  # of experts that were quantised when it was saved


def _models(module: nn.Module) -> Iterator[Any]:
    """The outermost models of transformers; those inside of one share its files."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _models(child)


_PATTERNS = ("rules", "skip", "only", "calibration")


def _ask_for_reader(config: Any, ask: bool) -> None:
    """Makes files with this configuration loadable through this quantiser alone, or by everything."""
    others = {name: each for name, each in (_fusions(config) or {}).items() if name != READER}
    if ask:
        config.fusion_config = {**others, READER: True}
    elif others:
        config.fusion_config = others
    elif _fusions(config) is not None:
        del config.fusion_config


def _fusions(config: Any) -> dict[str, Any] | None:
    return getattr(config, "fusion_config", None)


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: Int8FxQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def release(self, tensor: Tensor) -> None:
        """Gives back the pages of a file that was read, which would count as ours until its last
        tensor is. A ``state_dict`` is its owner's, who may have written to what is mapped."""
        if self.hf_quantizer.maps_files:
            pages.release_mapped(tensor)

    def quantized(self, model: nn.Module, name: str, weight: Tensor) -> QuantizedWeight:
        """The weight of a name in the form that it is kept in."""
        path = name.rpartition(".")[0]
        owner: Any = model.get_submodule(path)
        state_dict.attach(owner)
        config = self.hf_quantizer.quantization_config
        if name in self.hf_quantizer.experts:
            return QuantizedWeight.quantized(weight, config.parsed.choice(name), owner.is_transposed)
        transposed = keeps_transposed(owner)
        N, K = weight.shape[:: -1 if transposed else 1]
        return QuantizedWeight.quantized(weight, config.choice_of(path, (N, K)), transposed)

    def stands_for(self, model: nn.Module, name: str) -> QuantizedWeight:
        """The weight of a name on the meta device, which is put into the model."""
        empty = torch.empty_like(model.get_parameter(name), device="meta")
        weight = self.quantized(model, name, empty)
        parameter = nn.Parameter(weight, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
        return weight


class _Quantize(_Operation):
    """A float weight as it comes from the file, to int8.

    One that stays on disk stays in its file, in float, and is quantised each time it is brought.
    """

    def convert(self, input_dict: Any, model: Any = None, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        result = {}
        for name, value in input_dict.items():
            weight = single(value)
            if self.hf_quantizer.is_on_disk(name):
                self.stands_for(model, name)
                result[name] = weight
                continue
            quantized = self.quantized(model, name, weight)
            self.release(weight)
            result[name] = nn.Parameter(quantized, requires_grad=False)
        return result


class AsItIs(ConversionOps):
    """What saving undoes the reading with: ``state_dict`` has split int8 weights already."""

    def convert(self, input_dict: Any, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        return input_dict


class _Deserialize(_Operation):
    """The entries of a weight, as ``weight`` and ``weight_scale``, to the weight; a float ``weight``
    stays what it is."""

    @property
    def reverse_op(self) -> ConversionOps:
        return AsItIs()

    def convert(  # type: ignore[override]
        self, input_dict: Any, model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Any]:
        tensors = {name.removesuffix("$"): single(value) for name, value in input_dict.items()}
        own = full_layer_name.rpartition(".")[2]
        if tensors.keys() == {own} and tensors[own].is_floating_point():
            return tensors
        prefix = full_layer_name.removesuffix(own)
        state = {prefix + name: tensor for name, tensor in tensors.items()}
        like = self.stands_for(model, full_layer_name)
        weight = state_dict.read(full_layer_name, like, state)
        if self.hf_quantizer.is_on_disk(full_layer_name):
            return tensors
        assert weight is not None  # read has seen to it
        for tensor in tensors.values():
            self.release(tensor)
        return {own: nn.Parameter(weight, requires_grad=False)}


def is_in_shards(model: Any) -> bool:
    """Whether each process is to read a part of every weight."""
    distributed = getattr(model.config, "distributed_config", None)
    sizes = (getattr(distributed, name, None) for name in ("tp_size", "fsdp_size"))
    return any((size or 1) > 1 for size in sizes)


def _linear_weights(found: Iterable[Decision]) -> Iterator[str]:
    return (f"{decision.path}.weight" for decision in found)


def single(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value
