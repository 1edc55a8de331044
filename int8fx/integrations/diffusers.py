"""int8fx as a quantiser of diffusers::

    from int8fx.integrations.diffusers import Int8FxConfig

    unet = UNet2DConditionModel.from_pretrained(path, quantization_config=Int8FxConfig())
    unet.save_pretrained(directory)
    unet = UNet2DConditionModel.from_pretrained(directory)

The last line needs no import (``int8fx_autoload.py``). Where int8fx is not installed it raises
``Unknown quantization type, got int8fx``. The files hold what those of ``transformers.py`` hold.

What depends on the time step alone stays in float by default, and so does what modulates a norm: these
linears run on one row an image, and every pixel of the result depends on them.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from int8fx.errors import CheckpointError
from int8fx.kernels.schemes.scheme import Choice
from int8fx.options import Options, in_use
from int8fx.weights import state_dict
from int8fx.weights.quantize import OPTIONS as OF_QUANTIZE
from int8fx.weights.quantize import decisions, dequantize_
from int8fx.weights.sites import keeps_transposed
from int8fx.weights.tensor import QuantizedWeight

log = logging.getLogger(__name__)

OPTIONS = tuple(name for name in OF_QUANTIZE if name != "calibration")
SKIP = (
    "*time_emb*",  # UNets: time_embedding, and time_emb_proj of each block
    "*time_*embed*",  # transformers: time_embed, time_text_embed, time_guidance_embed
    "*timestep*",
    "*norm*.linear",  # AdaLayerNorm of all kinds
    "*modulation*",
    "*adaln*",
    "proj_out*",
)


class _Method(str, Enum):
    """diffusers asks a method for its ``value``, and puts it into messages."""

    INT8FX = "int8fx"

    def __str__(self) -> str:
        return self.value


class Int8FxConfig(QuantizationConfigMixin):
    """The options of ``int8fx.quantize_``, in a model's ``config.json``; by default ``skip=SKIP``.

    ``from_pretrained(..., quantization_config=Int8FxConfig())`` quantises each weight as it is read.

    Raises:
        ValueError: an option is unknown or out of range.

    Examples:
        >>> from int8fx.integrations.diffusers import Int8FxConfig
        >>> Int8FxConfig(threshold=3.0, skip=["+*.ff.*"]).options["skip"][-1]
        '*.ff.*'
    """

    def __init__(self, **options: Any) -> None:
        options.pop("quant_method", None)
        self.quant_method: Any = _Method.INT8FX
        self.options = {**options, "skip": _skip(options.get("skip", SKIP))}
        self.parsed = Options.parse(self.options, type(self).__name__, OPTIONS)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, **self.options}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def choice_of(self, name: str) -> Choice:
        """The scheme of the weight of a name, and its settings."""
        return self.parsed.choice(name.rpartition(".")[0])


def _skip(given: Any) -> Any:
    """A skip list; patterns that begin with ``+`` are added to ``SKIP``."""
    listed = isinstance(given, (list, tuple)) and all(isinstance(each, str) for each in given)
    if listed and given and all(each.startswith("+") for each in given):
        return [*SKIP, *(each[1:] for each in given)]
    return list(given) if listed else given


class Int8FxQuantizer(DiffusersQuantizer):
    """What diffusers asks while it loads and saves; see ``diffusers.quantizers.base``."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True
    is_compileable = True
    supports_parallel_loading = False  # an int8 weight and its scales may lie in two files
    quantization_config: Int8FxConfig

    def __init__(self, quantization_config: Int8FxConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.model: Any = None  # while it is read
        self.names: frozenset[str] = frozenset()
        self.parameters: frozenset[str] = frozenset()
        self.halves: dict[str, Tensor] = {}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises:
        ValueError: weights are to stay on disk, which diffusers writes there itself, in float.
        """
        if device_map is not None:
            importlib.import_module("int8fx.integrations.accelerate")  # what serves it
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("int8 weights of a diffusers model cannot stay on disk; give them the CPU")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32 if torch_dtype is None else torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in self.names}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Raises:
        ValueError: nothing of the model can be quantised.
        """
        found = decisions(model, **self.quantization_config.options)
        self.model = model
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        self.names = frozenset(f"{each.path}.weight" for each in found if each.accepted)
        if not self.names:
            reasons = "".join(f"\n  {decision}" for decision in found)
            raise ValueError(f"no weight of {type(model).__name__} can be quantised{reasons}")
        model.register_to_config(quantization_config=self.quantization_config)

    # --- reading: int8 values with their scales, or a float weight ------------------------------

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        keys = set(loaded_keys)
        whole = {key for key in loaded_keys if keys.issuperset(self._entries(self._weight_of(key)))}
        return list(dict.fromkeys(self._weight_of(k) if k in whole else k for k in loaded_keys))

    def maybe_update_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """One file's tensors, weights put together; parts wait for the file of the others."""
        self.halves |= {
            name: state.pop(name) for name in list(state) if self._is_half(name, state[name])
        }
        for name in sorted({self._weight_of(half) for half in self.halves}):
            entries = self._entries(name)
            if self.halves.keys() >= set(entries):
                state[name] = state_dict.read(name, self._like(name), self.halves)
                for entry in entries:
                    del self.halves[entry]
        return state

    def _entries(self, name: str) -> list[str]:
        """What the files hold of the weight of a name."""
        return state_dict.names_of(name, self.quantization_config.choice_of(name).weight_format)

    def _weight_of(self, entry: str) -> str:
        """The weight that an entry belongs to; other names are themselves."""
        choices = self.quantization_config.parsed.choices
        suffixes = filter(None, state_dict.names_of_all("", choices))
        owners = (entry.removesuffix(suffix) for suffix in suffixes if entry.endswith(suffix))
        return next((owner for owner in owners if owner.endswith("weight")), entry)

    def _is_half(self, name: str, tensor: Tensor) -> bool:
        if name in self.parameters:
            return not tensor.is_floating_point()
        return self._weight_of(name) in self.parameters

    def _form(self, owner: nn.Module, name: str) -> dict[str, Any]:
        form: dict[str, Any] = self.quantization_config.choice_of(name).options
        return {"transposed": keeps_transposed(owner), **form}

    def _like(self, name: str) -> QuantizedWeight:
        empty = torch.empty_like(self.model.get_parameter(name), device="meta")
        return QuantizedWeight.from_float(empty, **self._form(_owner(self.model, name), name))

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: Any, **_: Any
    ) -> bool:
        """Whether ``create_quantized_param`` is to put a tensor into the model."""
        fresh = not self.pre_quantized and param_name in self.names
        return fresh or isinstance(param_value, QuantizedWeight)

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> nn.Parameter:
        owner = _owner(model, param_name)
        weight = param_value.to(target_device)
        if not isinstance(weight, QuantizedWeight):
            weight = QuantizedWeight.from_float(weight, **self._form(owner, param_name))
        state_dict.attach(owner)
        parameter = nn.Parameter(weight, requires_grad=False)
        setattr(owner, param_name.rpartition(".")[2], parameter)
        return parameter

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Raises:
        CheckpointError: the files do not hold a weight, or one half of it.
        """
        self.model = None
        if self.halves:
            raise CheckpointError(f"{min(self.halves)}: int8 values or scales, without the other")
        state_dict.check_on_load(model)
        for name in sorted(self.names):
            if model.get_parameter(name).is_meta:
                raise CheckpointError(f"{name}: in the model, and missing in the checkpoint")

    def dequantize(self, model: Any) -> Any:
        return dequantize_(model)  # which calls dequantized, below


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


# --- models that quantize_ changed ---------------------------------------------------------------


def quantized(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Makes each model of diffusers in a module what ``from_pretrained`` would have made of it."""
    for found in _models(model):
        if getattr(found, "hf_quantizer", None) is None:
            # Files say what each weight is; rules are needed for its scheme, and of no use in a part.
            left = {"skip", "only", "calibration", "columns", *(() if found is model else ("rules",))}
            config = Int8FxConfig(**in_use({k: v for k, v in options.items() if k not in left}))
            found.hf_quantizer = Int8FxQuantizer(config, pre_quantized=False)
            found.register_to_config(quantization_config=config)
        if isinstance(found.hf_quantizer, Int8FxQuantizer):
            _allow_saving(found)


def _allow_saving(model: Any) -> None:
    try:
        config = model.hf_quantizer.quantization_config
        weights = model.named_parameters()
        state_dict.check_options(weights, lambda path: config.parsed.choice(path).options)
    except ValueError as error:
        log.warning("save_pretrained will refuse this %s: %s", type(model).__name__, error)
        model.hf_quantizer.is_serializable = False


def dequantized(model: nn.Module) -> None:
    """The way back."""
    for found in _models(model):
        if isinstance(getattr(found, "hf_quantizer", None), Int8FxQuantizer):
            del found.hf_quantizer
            found.is_quantized = False
            config = {k: v for k, v in found.config.items() if k != "quantization_config"}
            found._internal_dict = FrozenDict(config)


def _models(module: nn.Module) -> Iterator[Any]:
    if isinstance(module, ModelMixin):
        yield module
        return
    for child in module.children():
        yield from _models(child)
