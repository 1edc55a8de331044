"""The quantisation "int8fx" of vLLM: its options, and which layer gets which method.

Options are those of the backend (``int8fx.Options``), from ``quantization_config`` in a model's
``config.json``, or from the command line::

    vllm serve MODEL --hf-overrides '{"quantization_config":
        {"quant_method": "int8fx", "decomposition": "token", "skip": ["*.down_proj"]}}'

``calibration`` is the file of one, on each machine. They are checked before anything is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from int8fx.calibration import Calibration
from int8fx.integrations.vllm.experts import ExpertsMethod
from int8fx.integrations.vllm.files import FilesInInt8, StoredWeight
from int8fx.integrations.vllm.heads import HeadMethod
from int8fx.integrations.vllm.linears import Int8FxLinearMethod
from int8fx.integrations.vllm.modes import METHOD, compiles_with_ours
from int8fx.kernels.formats.format import ROWS
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.schemes.scheme import Choice
from int8fx.options import Options
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.select import LEAST_K, only_reason, skip_reason

OPTIONS = ("scheme", "rules", "skip", "only", "calibration")  # and the settings of schemes
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
        if self.of_bitsandbytes and not self.files.weights:
            raise ValueError(
                f"{TAKER}: no 8-bit weight of bitsandbytes is in the files of {model_name}"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.files = self.files.renamed(hf_to_vllm_mapper)
        if self.options.calibration is not None:
            renamed = _renamed(self.options.calibration, hf_to_vllm_mapper)
            self.options = replace(self.options, calibration=renamed)

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

    # --- decisions -------------------------------------------------------------------------------

    def _linear(self, layer: LinearBase, prefix: str) -> Any:
        shape = (layer.output_size, layer.input_size)
        paths = self.paths(prefix)
        is_router = isinstance(layer, ReplicatedLinear) and prefix.rpartition(".")[2] in ROUTERS
        in_files = self.files.stored(paths)
        if in_files is not None:
            choice = self._choice_in_files(paths, in_files)
            self._decided(prefix, shape, "", choice)
            return Int8FxLinearMethod(choice, in_files, fused=compiles_with_ours())
        reason = self._refusal(paths, layer.input_size, is_router)
        if reason:
            self._decided(prefix, shape, reason, None)
            return UnquantizedLinearMethod()
        calibrated = self.options.calibration is not None
        choice = self._one_choice(paths, _shapes(layer, paths) if calibrated else None)
        self._decided(prefix, shape, "", choice)
        return Int8FxLinearMethod(choice, None, fused=compiles_with_ours())

    def _choice_in_files(self, paths: Sequence[str], stored: StoredWeight) -> Choice:
        """Raises:
        ValueError: the options are not for what the files hold.
        """
        choice = self._one_choice(paths)
        weight_format, name = choice.weight_format, choice.scheme.name
        if found := stored.mismatch(weight_format):
            raise ValueError(
                f"{TAKER}: the files hold {paths[0]} as {found}, and the scheme {name!r} keeps weights "
                f"as {weight_format.name}"
            )
        if not all(part.dims[:1] == (ROWS,) for part in weight_format.parts):
            raise ValueError(
                f"{TAKER}: the files hold {paths[0]} as {weight_format.name}, of which a part does not "
                "have the rows of the weight; give the float model, and vLLM quantises it"
            )
        if self.options.calibration is not None and getattr(choice.settings, "keeps_columns", False):
            raise ValueError(
                f"{TAKER}: the files hold {paths[0]} with its columns; leave out the option "
                "'calibration', which is for float weights"
            )
        return choice

    def _experts(self, layer: RoutedExperts, prefix: str) -> Any:
        if self.files.any_below(prefix):
            raise ValueError(
                f"{TAKER}: {prefix} is in int8 in the files; experts are read in float only"
            )
        moe = layer.moe_config
        reason, choice = self._refusal((prefix,), moe.hidden_dim, False), self.options.choice(prefix)
        if not reason and choice.scheme.experts is None:
            reason = f"scheme {choice.scheme.name!r} has no product for experts"
        self._decided(prefix, None, reason, choice)
        if reason:
            return None
        # A calibration names the matrices as transformers keeps them; each expert is of the shape.
        width = moe.intermediate_size
        gate_up = f"{prefix}.gate_up_proj", (2 * width, moe.hidden_dim)
        down = f"{prefix}.down_proj", (moe.hidden_dim, width)
        matrices = {"w13": gate_up, "w2": down}
        calibrated = {name: self.options.calibrated(choice, *each) for name, each in matrices.items()}
        return ExpertsMethod(moe, calibrated)

    def _head(self, layer: ParallelLMHead, prefix: str) -> HeadMethod:
        shape, paths = (layer.org_vocab_size, layer.embedding_dim), (prefix,)
        in_files = self.files.stored(paths)
        if in_files is not None:
            choice = self._choice_in_files(paths, in_files)
            self._decided(prefix, shape, "", choice)
            return HeadMethod(choice, in_files)
        by_default = self.options.skips_by_default and self.options.quantizes_head(prefix)
        if not by_default and self._skipped(paths):
            self._decided(prefix, shape, "skip: the output head", None)
            return HeadMethod(None)
        choice = self._one_choice(paths, [shape])
        self._decided(prefix, shape, "", choice)
        return HeadMethod(choice)

    def paths(self, prefix: str) -> tuple[str, ...]:
        """The modules of the checkpoint behind a layer: vLLM keeps q, k and v as one matrix."""
        owner, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return tuple(f"{owner}.{part}" if owner else part for part in parts)

    def _skipped(self, paths: Sequence[str]) -> str:
        found = {self._skip_reason(path) for path in paths}
        if len(found) > 1:
            raise ValueError(
                f"{TAKER}: vLLM keeps {', '.join(paths)} as one matrix, and the options `skip` and "
                "`only` leave some of them in float; name all of them or none"
            )
        return found.pop()

    def _skip_reason(self, path: str) -> str:
        return skip_reason(path, self.options.skip) or only_reason(path, self.options.only)

    def _refusal(self, paths: Sequence[str], K: int, is_router: bool) -> str:
        if reason := self._skipped(paths):
            return reason
        if self.options.only is None and is_router and self.options.skips_by_default:
            return "skip: it ranks experts"
        if self.options.only is None and K < LEAST_K:
            return f"fewer than {LEAST_K} columns"
        return self._one_choice(paths).refusal(current_platform.device_type) or ""

    def _one_choice(
        self, paths: Sequence[str], shapes: Sequence[tuple[int, int]] | None = None
    ) -> Choice:
        """The scheme of matrices that vLLM keeps as one.

        Args:
            shapes: ``(N, K)`` of each, whose columns a calibration says; None: it is not asked.

        Raises:
            ValueError: they have different ones, or a calibration is of another model
                (``CalibrationError``).
        """
        choices = [self.options.choice(path) for path in paths]
        if shapes is not None:
            choices = list(map(self.options.calibrated, choices, paths, shapes))
        for path, choice in zip(paths, choices, strict=True):
            if choice != choices[0]:
                raise ValueError(
                    f"{TAKER}: vLLM keeps {', '.join(paths)} as one matrix, and the options give "
                    f"{path} another scheme, setting or columns than {paths[0]}"
                )
        return choices[0]

    def _decided(self, path: str, shape: Any, reason: str, choice: Choice | None) -> None:
        scheme = "" if reason or choice is None else choice.scheme.name
        self.decisions.append(Decision(path, "vLLM", shape, not reason, reason, scheme))


def _shapes(layer: LinearBase, paths: Sequence[str]) -> list[tuple[int, int]]:
    """``(N, K)`` of the matrices of the files that a layer of vLLM is.

    Raises:
        ValueError: vLLM does not say how many rows each has.
    """
    if isinstance(layer, QKVParallelLinear):
        # Not its ``output_sizes``: more processes than heads of k and v have copies of these.
        of_keys = layer.total_num_kv_heads
        heads = (layer.total_num_heads, layer.head_size), (of_keys, layer.head_size)
        sizes = [number * size for number, size in (*heads, (of_keys, layer.v_head_size))]
    else:
        sizes = list(getattr(layer, "output_sizes", [layer.output_size]))
    if len(paths) == 1:
        sizes = [sum(sizes)]
    if len(sizes) != len(paths):
        raise ValueError(
            f"{TAKER}: vLLM keeps {', '.join(paths)} as one matrix of {len(sizes)} parts, whose rows a "
            "calibration cannot be checked with; leave it in float (skip)"
        )
    return [(N, layer.input_size) for N in sizes]


def _renamed(calibration: Calibration, mapper: WeightsMapper) -> Calibration:
    """With the paths that vLLM's model has."""
    named = ((mapper.map_name(linear.path), linear) for linear in calibration.linears)
    linears = tuple(replace(linear, path=path) for path, linear in named if path is not None)
    return replace(calibration, linears=linears)
