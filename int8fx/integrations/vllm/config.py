"""The quantisation "int8fx" of vLLM: its options, and which layer gets which method.

Options are those of the backend (``int8fx.Options``), from ``quantization_config`` in a model's
``config.json``, or from the command line::

    vllm serve MODEL --hf-overrides '{"quantization_config":
        {"quant_method": "int8fx", "decomposition": "token", "skip": ["*.down_proj"]}}'

They are checked before anything is loaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from int8fx.integrations.vllm.experts import ExpertsMethod
from int8fx.integrations.vllm.files import FilesInInt8
from int8fx.integrations.vllm.heads import HeadMethod
from int8fx.integrations.vllm.linears import Int8FxLinearMethod
from int8fx.integrations.vllm.modes import METHOD, compiles_with_ours
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import SCHEMES
from int8fx.options import Options
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.select import LEAST_K, only_reason, skip_reason

OPTIONS = ("scheme", "rules", "skip", "only")  # and the settings of schemes
TAKER = "vLLM's quantization 'int8fx'"
BITSANDBYTES = "bitsandbytes"
# What vLLM's models call the linear that ranks experts.
ROUTERS = ("gate", "router")


class Int8FxConfig(QuantizationConfig):
    """See above.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, of_bitsandbytes: bool = False) -> None:
        super().__init__()
        self.options = Options.parse(options, TAKER, OPTIONS)
        self.of_bitsandbytes = of_bitsandbytes
        self.files = FilesInInt8({})
        self.decisions: list[Decision] = []

    @classmethod
    def register(cls) -> None:
        """Makes it known to vLLM, once."""
        if METHOD not in QUANTIZATION_METHODS:
            register_quantization_config(METHOD)(cls)

    # --- what vLLM asks of every quantisation ----------------------------------------------------

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Int8FxConfig":
        """Of ``quantization_config`` in a ``config.json``, int8fx's or bitsandbytes'."""
        if config.get("quant_method") == BITSANDBYTES:
            return cls({"threshold": config.get("llm_int8_threshold", 6.0)}, of_bitsandbytes=True)
        return cls({name: value for name, value in config.items() if name != "quant_method"})

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Takes bitsandbytes' 8-bit files, which vLLM itself does not read."""
        ours = (hf_quant_cfg or {}).get("quant_method") == BITSANDBYTES
        return METHOD if ours and hf_quant_cfg.get("load_in_8bit") else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """bitsandbytes writes the layout of each weight beside it, which is always the same."""
        return WeightsMapper(orig_to_new_suffix={".weight_format": None})

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Looks at what the files hold, before anything is loaded.

        Raises:
            ValueError: files of bitsandbytes hold no int8 weight, as far as can be seen: their values
                would be taken for floats.
        """
        self.files = FilesInInt8.of(model_name, revision)
        if self.of_bitsandbytes and not self.files.kinds:
            raise ValueError(
                f"{TAKER}: no 8-bit weight of bitsandbytes is in the files of {model_name}"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.files = self.files.renamed(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Raises:
        ValueError: matrices that vLLM keeps as one are to be quantised differently.
        """
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            return self._head(layer, prefix)
        return None

    def fuses(self) -> bool:
        """Whether every scheme of the options is one whose linears the backend rewrites and fuses."""
        names = {self.options.scheme, *(rule.scheme for rule in self.options.rules)}
        return all(SCHEMES[name].choice().weight_format is PER_CHANNEL for name in names)

    # --- decisions -------------------------------------------------------------------------------

    def _linear(self, layer: LinearBase, prefix: str) -> Any:
        shape = (layer.output_size, layer.input_size)
        paths = self.paths(prefix)
        is_router = isinstance(layer, ReplicatedLinear) and prefix.rpartition(".")[2] in ROUTERS
        in_files = self.files.kind_of(paths)
        if in_files:
            choice = self._one_choice(paths)
            if choice.weight_format is not PER_CHANNEL:
                raise ValueError(
                    f"{TAKER}: the files hold {prefix} as {PER_CHANNEL.name}, and the scheme "
                    f"{choice.scheme.name!r} keeps weights as {choice.weight_format.name}"
                )
            self._decided(prefix, shape, "", choice)
            return Int8FxLinearMethod(choice, in_files, fused=compiles_with_ours())
        reason = self._refusal(paths, layer.input_size, is_router)
        choice = self._one_choice(paths)
        self._decided(prefix, shape, reason, choice)
        if reason:
            return UnquantizedLinearMethod()
        return Int8FxLinearMethod(choice, None, fused=compiles_with_ours())

    def _experts(self, layer: RoutedExperts, prefix: str) -> Any:
        if self.files.any_below(prefix):
            raise ValueError(
                f"{TAKER}: {prefix} is in int8 in the files; experts are read in float only"
            )
        reason = self._refusal((prefix,), layer.moe_config.hidden_dim, False)
        choice = self._one_choice((prefix,))
        if not reason and (choice.scheme.experts is None or choice.weight_format is not PER_CHANNEL):
            reason = f"scheme {choice.scheme.name!r} has no product for experts"
        self._decided(prefix, None, reason, choice)
        return None if reason else ExpertsMethod(layer.moe_config, choice)

    def _head(self, layer: ParallelLMHead, prefix: str) -> HeadMethod:
        if self.files.any_below(prefix):
            raise ValueError(f"{TAKER}: {prefix} is in int8 in the files; a head must be in float")
        choice = None if self._skipped((prefix,)) else self._one_choice((prefix,))
        reason = "skip: the output head" if choice is None else ""
        self._decided(prefix, (layer.num_embeddings, layer.embedding_dim), reason, choice)
        return HeadMethod(choice)

    def paths(self, prefix: str) -> tuple[str, ...]:
        """The modules of the checkpoint behind a layer: vLLM keeps q, k and v as one matrix."""
        owner, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return tuple(f"{owner}.{part}" if owner else part for part in parts)

    def _skipped(self, paths: tuple[str, ...]) -> str:
        found = {self._skip_reason(path) for path in paths}
        if len(found) > 1:
            raise ValueError(
                f"{TAKER}: vLLM keeps {', '.join(paths)} as one matrix, and the options `skip` and "
                "`only` leave some of them in float; name all of them or none"
            )
        return found.pop()

    def _skip_reason(self, path: str) -> str:
        return skip_reason(path, self.options.skip) or only_reason(path, self.options.only)

    def _refusal(self, paths: tuple[str, ...], K: int, is_router: bool) -> str:
        if reason := self._skipped(paths):
            return reason
        if self.options.only is None and is_router and self.options.skips_by_default:
            return "skip: it ranks experts"
        if self.options.only is None and K < LEAST_K:
            return f"fewer than {LEAST_K} columns"
        return ""

    def _one_choice(self, paths: tuple[str, ...]) -> Choice:
        choices = {path: self.options.choice(path) for path in paths}
        first = choices[paths[0]]
        for path, choice in choices.items():
            if choice != first:
                raise ValueError(
                    f"{TAKER}: vLLM keeps {', '.join(paths)} as one matrix, and the rules give "
                    f"{path} another scheme or setting than {paths[0]}"
                )
        return first

    def _decided(self, path: str, shape: Any, reason: str, choice: Choice | None) -> None:
        scheme = "" if reason or choice is None else choice.scheme.name
        self.decisions.append(Decision(path, "vLLM", shape, not reason, reason, scheme))
