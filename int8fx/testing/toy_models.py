"""Any architecture of transformers at toy size, with inputs for it: configs shrunk by field names.

A configuration is shrunk by *recipes*, strongest first, until a model of it runs: ``narrow`` makes
widths, depths, vocabularies, expert counts and images small; ``shallow`` leaves widths as they are
(some depend on each other in ways that no name tells); ``scaled`` divides every width and head size by
one number; ``deep`` leaves depths as they are (stages are counted by other fields); ``as published``
takes the defaults, if they are small. What no rule can know is in ``OVERRIDES``.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from int8fx.testing.toy_inputs import IMAGE_TOKEN, VOCABULARY, input_sets

MAX_PARAMETERS = 150_000_000
NO_CLASS = "no class of transformers is built from it"

# The class that is built of an architecture: the first of these tasks that it has a class for.
TASKS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "image and text to text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "multimodal LM": "MODEL_FOR_MULTIMODAL_LM",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "masked LM": "MODEL_FOR_MASKED_LM",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION",
    "video classification": "MODEL_FOR_VIDEO_CLASSIFICATION",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION",
    "CTC": "MODEL_FOR_CTC",
    "zero-shot image classification": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "object detection": "MODEL_FOR_OBJECT_DETECTION",
    "segmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION",
    "semantic segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "depth estimation": "MODEL_FOR_DEPTH_ESTIMATION",
    "time series": "MODEL_FOR_TIME_SERIES_PREDICTION",
    "encoder": "MODEL",
    "text to waveform": "MODEL_FOR_TEXT_TO_WAVEFORM",
    "text to spectrogram": "MODEL_FOR_TEXT_TO_SPECTROGRAM",
    "pretraining": "MODEL_FOR_PRETRAINING",
}


def architectures() -> list[str]:
    """Every model type that transformers knows a configuration for."""
    return sorted(CONFIG_MAPPING_NAMES)


def model_class(model_type: str) -> tuple[str, type[PreTrainedModel]]:
    """The task and the class that stand for an architecture.

    Where no automatic class serves it (text, vision and audio parts of other models), it is the class
    beside the configuration that says it is built from it.

    Raises:
        LookupError: there is none.
    """
    mappings = [name for name in dir(modeling_auto) if re.match(r"MODEL_\w*_?MAPPING_NAMES$", name)]
    tables = {task: f"{name}_MAPPING_NAMES" for task, name in TASKS.items()}
    rest = {name.removesuffix("_MAPPING_NAMES").lower(): name for name in mappings}
    for task, table in (tables | {k: v for k, v in rest.items() if v not in tables.values()}).items():
        names = getattr(modeling_auto, table, {}).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found = getattr(transformers, name, None)
            if found is not None:
                return task, found
    return "part", _class_of(CONFIG_MAPPING[model_type])


def _class_of(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LookupError(NO_CLASS) from error
    found = [
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and each.config_class is config_class
        and each.__module__ == name
        and not each.__name__.endswith("PreTrainedModel")
    ]
    if not found:
        raise LookupError(NO_CLASS)
    return max(found, key=lambda each: (each.__name__.endswith("Model"), each.__name__))


# --- configurations -------------------------------------------------------------------------------

_DEPTH = re.compile(
    r"^(n_?layers?|num_layers|num_blocks|depth|layers|.*num_hidden_layers|\w*coder_layers|"
    r"(num_)?(en|de)coder_layers|\w*_num_layers|num_\w*coder_layers|c2f_num_blocks|"
    r"num_(encoder_)?blocks|num_residual_layers|num_res_blocks|\w*_depth|n_layers|"
    r"num_mel_attn_blocks|resampler_depth|num_lstm_layers|lqe_layers|depths|stage_num_blocks|"
    r"blocks_per_stage|stage_numb_of_layers|num_block_repeats)$"
)
_WIDTH = re.compile(
    r"^(\w*hidden_sizes?|\w*hidden_dim|\w*intermediate_size\w*|d_model|d_ff|ffn_dim|\w*ffn_dim|"
    r"embed_dims?|\w*_embed_dim|n_embd|n_inner|emb_dim|dim|\w*embedding_size|word_embed_proj_dim|"
    r"mlp_dim|projection_dim|project_dim|output_dim|fusion_hidden_size|d_inner|\w*linear_units|"
    r"ffn_hidden_size|moe_shared_expert_intermediate_size|model_dim|embedding_dim|"
    r"classifier_proj_size|query_pre_attn_scalar|tdnn_dim|pooler_output_size)$"
)
_HEADS = re.compile(r"^(\w*num_attention_heads|n_heads?|num_heads|\w*attention_heads|index_n_heads)$")
_KV_HEADS = re.compile(r"^\w*num_key_value_heads$")
_HEAD_DIM = re.compile(r"^(\w*head_dim|d_kv|kv_channels|d_head)$")
_EXPERTS = re.compile(
    r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_total_experts)$"
)
_POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|max_source_positions)$")
_TOP_K = re.compile(r"^(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts)$")
_DENSE_LAYERS = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$")
_PLACEHOLDER = re.compile(
    r"^(image|audio|video|boi|eoi|boa|eoa|vision|speech|\w+_start|\w+_end)\w*_(id|index)$"
)
# Computed from other fields, or keyed by integers, which to_dict() loses on the way back.
_DERIVED = frozenset(
    "id2label label2id per_layer_config qk_head_dim transformers_version architectures".split()
)
# Fields that a published checkpoint has, and the defaults have not.
_UNSET = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
_STAGES = frozenset(("stage_names", "out_features", "out_indices"))  # in number, the depth
_TYPES = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

Rule = tuple[re.Pattern[str], Callable[[Any], Any]]


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Over a number, or numbers in lists: other values stay."""
    if isinstance(value, (list, tuple)):
        return [_map(item, change) for item in value]
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return change(value) if plain else value


def _narrow(factor: int) -> tuple[Rule, ...]:
    def width(value: Any) -> Any:
        return value if value < 64 else type(value)(max(32, value // factor // 16 * 16))

    return (
        (_WIDTH, width),
        (_HEADS, lambda heads: min(heads, 4)),
        # Many are as many as there are heads, as latent attention asks; few are groups.
        (_KV_HEADS, lambda heads: min(heads, 4 if heads >= 12 else 2)),
        (_HEAD_DIM, lambda size: min(size, 16)),
    )


def _scaled(divisor: int) -> tuple[Rule, ...]:
    def size(value: Any) -> Any:
        return value // divisor if value % divisor == 0 and value > divisor else value

    return (_WIDTH, size), (_HEAD_DIM, size)


_FEW: tuple[Rule, ...] = (
    (_EXPERTS, lambda experts: min(experts, 4)),
    (_TOP_K, lambda k: min(k, 2)),
    # Of more groups than one, one is chosen first.
    (re.compile(r"^(n_group|num_expert_group)$"), lambda groups: 2),
    (re.compile(r"^topk_group$"), lambda groups: 1),
    (re.compile(r"^\w*vocab_size\w*$"), lambda size: min(size, VOCABULARY)),
    (_POSITIONS, lambda n: min(n, 512)),
)
_SHALLOW: tuple[Rule, ...] = (
    (_DEPTH, lambda depth: min(depth, 1)),
    (_DENSE_LAYERS, lambda layers: 0),
    *_FEW,
)


def _shrunk(values: dict, rules: tuple[Rule, ...], counter: Iterator[int]) -> dict:
    result = {}
    shallow = any(pattern is _DEPTH for pattern, _ in rules)
    for name, value in values.items():
        if name in _DERIVED or (shallow and name in _STAGES):
            continue
        if not isinstance(name, str):
            result[name] = value
            continue
        if value is None:
            value = _UNSET.get(name)
        if isinstance(value, dict) and name not in ("rope_parameters", "rope_scaling"):
            result[name] = _shrunk(value, rules, counter)
            continue
        if _PLACEHOLDER.match(name) and isinstance(value, int):
            value = next(counter)
        elif name.endswith("token_id") and isinstance(value, int) and value >= IMAGE_TOKEN:
            value = 3
        elif name == "head_dim" and value is None and any(pattern is _HEADS for pattern, _ in rules):
            value = 16
        for pattern, change in rules:
            if pattern.match(name):
                value = _map(value, change)
        result[name] = value
    return _one_layer_of_each_type(result) if shallow else result


def _one_layer_of_each_type(values: dict) -> dict:
    """Lists of layer types cut down to one of each, and the number of layers with them."""
    kinds = [name for name in _TYPES if isinstance(values.get(name), (list, tuple))]
    if kinds:
        rows = list(dict.fromkeys(zip(*(values[name] for name in kinds), strict=False)))
        for position, name in enumerate(kinds):
            values[name] = [row[position] for row in rows]
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in values:
                values[name] = len(rows)
    return values


# None: the defaults, untouched.
RECIPES: dict[str, tuple[Rule, ...] | None] = {
    "narrow": (*_narrow(16), *_SHALLOW),
    "shallow": _SHALLOW,
    "scaled": (*_scaled(8), *_SHALLOW),
    "deep": (*_scaled(4), *_FEW),
    "as published": None,
}

# Where names mislead: values that are set after shrinking (dots descend).
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "depth_anything": {"neck_hidden_sizes": [32], "reassemble_factors": [1]},
    "flan-t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_ocr2_text": {"topk_method": "group_limited_greedy"},
    "unlimited_ocr_text": {"topk_method": "group_limited_greedy"},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "switch_transformers": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "gpt_neo": {"attention_types": [[["global"], 1]], "attention_layers": ["global"]},
}


# Models that are a model type of another name with other values.
ALIASES = {"flan-t5": "t5"}


def toy_config(model_type: str, recipe: str) -> PreTrainedConfig:
    """The configuration of a model type, made small."""
    config_class = CONFIG_MAPPING[ALIASES.get(model_type, model_type)]
    rules = RECIPES[recipe]
    if rules is None:
        return config_class()
    values = config_class().to_dict()
    values.pop("model_type", None)
    values = _shrunk(values, rules, iter(range(IMAGE_TOKEN, VOCABULARY)))
    for path, value in OVERRIDES.get(model_type, {}).items():
        *parents, name = path.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[name] = value
    return config_class(**values)


@dataclass
class Toy:
    """A model that runs, and how to call it."""

    model_type: str
    task: str
    recipe: str
    model: nn.Module
    inputs: dict[str, Any]
    expected: Any


def _seeded(model: nn.Module) -> nn.Module:
    """Weights of a size that lets signals through: many initialisations are zeros, or tiny."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2 and parameter.numel() and parameter.is_floating_point():
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, min(1.0, fan_in**-0.5), generator=generator)
        elif not parameter.isfinite().all():
            parameter.data.zero_()
    return model


def _model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    config.use_cache = False
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        # Some models of this release read it from configurations that have none.
        if isinstance(part, PreTrainedConfig) and not hasattr(part, "pad_token_id"):
            part.pad_token_id = None
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters are no toy")
    torch.manual_seed(0)
    return _seeded(cls(config)).eval()


def build(model_type: str) -> Toy:
    """A toy of an architecture, run once.

    Raises:
        LookupError: it has no class.
        RuntimeError: no recipe and no inputs make it run; says what each came to.
    """
    task, cls = model_class(ALIASES.get(model_type, model_type))
    failures: list[str] = []
    for recipe in RECIPES:
        try:
            model = _model(cls, toy_config(model_type, recipe))
        except Exception as error:
            failures.append(f"{recipe}: {type(error).__name__}: {_line(error)}")
            continue
        guesses = list(input_sets(model))
        if not guesses:
            failures.append(f"nothing here makes what {cls.__name__}.forward asks for")
        for makers in guesses:
            try:
                torch.manual_seed(0)
                inputs = {name: make(model) for name, make in makers.items()}
                torch.manual_seed(0)
                with torch.no_grad():
                    expected = model(**inputs)
            except Exception as error:
                failures.append(f"{recipe}, {list(makers)}: {type(error).__name__}: {_line(error)}")
                continue
            return Toy(model_type, task, recipe, model, inputs, expected)
    raise RuntimeError("; ".join(failures))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
