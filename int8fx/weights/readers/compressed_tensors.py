"""compressed-tensors' files, as llm-compressor writes them.

int-quantized, naive-quantized    weight [N, K] int8, weight_scale [N, 1], [N, G] or [1]
float-quantized                   the same of float8_e4m3fn, which no integers stand for
pack-quantized                    weight_packed [N, K · bits / 32] int32: a stream of bits along K, of
                                  integers plus 2^(bits - 1)
                                  weight_shape [2], weight_g_idx [K] (act-order)
weight_zero_point                 as the integers; packed: a stream along N, [N · bits / 32, G]

ŵ = (q - zero_point) · scale
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.weights.readers.fp8 import values
from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import DYNAMIC, DYNAMIC_AFFINE, Grouped, Values
from int8fx.weights.readers.settings import Config
from int8fx.weights.readers.unpacking import unpack, words_for

PLAIN, PACKED, FLOAT = "plain", "packed", "float"
FORMATS = {
    "int-quantized": PLAIN,
    "naive-quantized": PLAIN,
    "pack-quantized": PACKED,
    "float-quantized": FLOAT,
}
MIXED = "mixed-precision"
_STRATEGIES = ("tensor", "channel", "group", "block")
_CONFIG = frozenset(
    "quant_method config_groups ignore format quantization_status global_compression_ratio version "
    "kv_cache_scheme sparsity_config transform_config moe_sparsity_config run_compressed dequantize "
    "use_optimized_inference".split()
)
_GROUP = frozenset("targets weights input_activations output_activations format".split())
_ARGS = frozenset(
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype "
    "observer observer_kwargs".split()
)
# What would change a product, and is not done.
_UNREAD = ("kv_cache_scheme", "transform_config", "moe_sparsity_config")


@dataclass(frozen=True)
class Weights:
    """How some modules' weights are kept.

    Attributes:
        layout: of ``FORMATS``.
        group: columns that share a scale; 0: all.
        owner: how the input is quantised, by token; empty: it is not.
    """

    targets: tuple[str, ...]
    layout: str
    bits: int
    group: int
    symmetric: bool
    strategy: str
    act_order: bool
    owner: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    groups: tuple[Weights, ...]
    origin: Config

    def of(self, module: StoredModule) -> Weights:
        """The most specific that names a module: by its path, by a pattern, by its class.

        Raises:
            CheckpointError: there is none.
        """
        for says in (_is_path, _is_pattern, _is_class):
            for weights in self.groups:
                if any(says(target, module) for target in weights.targets):
                    return weights
        raise self.origin.error(f"config_groups: no targets name {module.path}")


def _is_path(target: str, module: StoredModule) -> bool:
    return target == module.path


def _is_pattern(target: str, module: StoredModule) -> bool:
    return target.startswith("re:") and re.match(target[3:], module.path) is not None


def _is_class(target: str, module: StoredModule) -> bool:
    return target == module.kind


def settings(config: Config) -> Settings:
    """Raises:
    CheckpointError: an option is unknown, or has a value that is not read.
    """
    config.only(_CONFIG)
    for name in _UNREAD:
        if config.get(name):
            raise config.error(f"{name} = {config.get(name)!r} is not read")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise config.error(f"sparsity_config: format = {sparsity['format']!r}; read: 'dense'")
    config.one_of("quantization_status", ("compressed", "frozen"), "compressed")
    config.one_of("format", (*FORMATS, MIXED))
    given = config.get("config_groups")
    if not isinstance(given, Mapping) or not given:
        raise config.error(f"config_groups = {given!r}; settings by name expected")
    groups = tuple(_weights(config, name, group) for name, group in given.items())
    return Settings(groups, config)


def _weights(config: Config, name: str, given: Any) -> Weights:
    if not isinstance(given, Mapping):
        raise config.error(f"config_groups: {name} = {given!r}; settings expected")
    group = Config(given, f"{config.origin}: config_groups: {name}")
    group.only(_GROUP)
    if group.get("output_activations"):
        raise group.error("output_activations are not read")
    args = Config(group.get("weights", {}), f"{group.origin}: weights")
    args.only(_ARGS)
    layout = FORMATS.get(group.get("format", config.get("format")))
    if layout is None:
        raise group.error(f"format = {group.get('format')!r}; read: {', '.join(FORMATS)}")
    args.one_of("type", ("float",) if layout == FLOAT else ("int",), "int")
    targets = group.get("targets", [])
    _check_patterns(group, targets)
    strategy = args.get("strategy") or _strategy(args)
    return Weights(
        tuple(targets),
        layout,
        args.one_of("num_bits", range(1, 9) if layout == PACKED else (8,), 8),
        args.whole("group_size", 1) if strategy == "group" else 0,
        args.one_of("symmetric", (True, False), True),
        Config({"strategy": strategy}, args.origin).one_of("strategy", _STRATEGIES),
        args.one_of("actorder", ("group", "dynamic", "weight", "static", False), False)
        in ("group", "dynamic"),
        _owner(group),
    )


def _strategy(args: Config) -> str:
    group = args.get("group_size")
    return "tensor" if group is None else "channel" if group == -1 else "group"


def _owner(group: Config) -> Mapping[str, Any]:
    given = group.get("input_activations")
    if not given:
        return {}
    args = Config(given, f"{group.origin}: input_activations")
    args.only(_ARGS)
    args.one_of("num_bits", (8,), 8)
    # What calibration found for all inputs is not what a row of them has.
    args.one_of("dynamic", (True,), False)
    return DYNAMIC if args.one_of("symmetric", (True, False), True) else DYNAMIC_AFFINE


def _check_patterns(group: Config, targets: Any) -> None:
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise group.error(f"targets = {targets!r}; a list of names expected")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise group.error(f"targets: {target!r} is no pattern: {error}") from error


def read(module: StoredModule, settings: Settings) -> Grouped | Values:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    weights = settings.of(module)
    if weights.layout == FLOAT:
        return values(module, "weight_scale", None)
    codes = _packed(module, weights) if weights.layout == PACKED else _plain(module)
    N, K = codes.shape
    group = weights.group or K
    scale = _scale(module, weights, N, -(-K // group))
    groups = scale.shape[1]
    return Grouped(
        codes=codes,
        scale=scale,
        group=group,
        bits=weights.bits,
        zero_point=_zero_point(module, weights, codes, groups),
        g_idx=_order(module, weights, K, groups),
        owner=weights.owner,
    )


def _plain(module: StoredModule) -> Tensor:
    return module.take("weight", torch.int8, None, None)


def _packed(module: StoredModule, weights: Weights) -> Tensor:
    shape = module.take("weight_shape", (torch.int64, torch.int32), 2).tolist()
    if min(shape) < 1:
        raise module.error("weight_shape", f"{shape} is that of no matrix")
    N, K = shape
    packed = module.take("weight_packed", torch.int32, N, words_for(K, weights.bits))
    return _signed(unpack(packed, weights.bits, K), weights.bits)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Of 8 bits as int8, which have kernels; others stay unsigned, with 2^(bits - 1) for 0."""
    return (codes ^ 0x80).view(torch.int8) if bits == 8 else codes


def _scale(module: StoredModule, weights: Weights, N: int, groups: int) -> Tensor:
    if weights.strategy == "block":
        raise module.error("weight_scale", "integers in blocks of rows and columns are not read")
    scale = module.take_floats("weight_scale")
    if weights.strategy == "tensor" and scale.numel() == 1:
        return scale.view(1, 1).expand(N, 1)
    return module.take_floats("weight_scale", N, groups)


def _zero_point(module: StoredModule, weights: Weights, codes: Tensor, groups: int) -> Tensor | None:
    N, bits = codes.shape[0], weights.bits
    if weights.symmetric:
        if codes.dtype == torch.int8:
            return None
        return torch.full((N, groups), 2 ** (bits - 1), dtype=torch.uint8, device=codes.device)
    if weights.layout == PLAIN:
        return module.take("weight_zero_point", torch.int8, N, groups)
    packed = module.take("weight_zero_point", torch.int32, words_for(N, bits), groups)
    return _signed(unpack(packed.t(), bits, N).t().contiguous(), bits)


def _order(module: StoredModule, weights: Weights, K: int, groups: int) -> Tensor | None:
    if not module.has("weight_g_idx"):
        if weights.act_order:
            raise module.error("weight_g_idx", "missing in the checkpoint, and actorder is 'group'")
        return None
    g_idx = module.take_groups("weight_g_idx", K, groups)
    in_order = torch.arange(K, dtype=torch.int32, device=g_idx.device) // (weights.group or K)
    return None if torch.equal(g_idx, in_order) else g_idx
