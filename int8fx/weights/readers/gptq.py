"""GPTQ's files, versions 1 and 2, as AutoGPTQ and gptqmodel write them.

    qweight   [K · bits / 32, N] int32   a stream of bits along K for each output
    qzeros    [G, N · bits / 32] int32   a stream along N: the zero point z, in version 1 z - 1
    scales    [G, N]                     ŵ = (q - z) · scale
    g_idx     [K] int32                  the group of each input; with act-order these are not sorted

gptqmodel subtracts version 1's one from whole words of 2, 4 and 8 bits, borrows between fields
included, so it is added to whole words here. Fields of 3 bits cross words, and each is counted modulo
8.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config
from int8fx.weights.readers.unpacking import unpack, words_for

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
# A one in each field of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
# What tells how the file was made, or how its owner runs it: nothing of it changes what is stored.
_OF_THE_MAKER = frozenset(
    "quant_method method meta damp_percent damp_auto_increment static_groups true_sequential mse gptaq "
    "foem model_name_or_path model_file_base_name model_seqlen block_name_to_quantize "
    "module_name_preceding_first_block batch_size pad_token_id dataset tokenizer use_cuda_fp16 "
    "use_exllama exllama_config max_input_length cache_block_outputs modules_in_block_to_quantize "
    "desc_act sym lm_head act_group_aware backend is_marlin_format adapter rotation hyb_act "
    "parallel_packing pack_impl offload_to_disk disable_exllama modules_to_not_convert".split()
)
_READ = frozenset({"bits", "group_size", "checkpoint_format", "format", "pack_dtype", "dynamic"})


@dataclass(frozen=True)
class Rule:
    """Some modules' own settings: those whose path a pattern matches, the first one that does."""

    pattern: re.Pattern[str]
    skips: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Attributes:
    group: columns that share a scale; 0: all.
    """

    version: int
    bits: int
    group: int
    rules: tuple[Rule, ...] = ()

    def of(self, path: str) -> tuple[int, int]:
        """Bits and group of a module."""
        rule = next((rule for rule in self.rules if rule.pattern.match(path)), None)
        if rule is None or rule.skips:
            return self.bits, self.group
        return rule.settings.get("bits", self.bits), rule.settings.get("group_size", self.group)


def settings(config: Config) -> Settings:
    """Raises:
    CheckpointError: an option is unknown, or has a value that is not read.
    """
    config.only(_OF_THE_MAKER | _READ)
    formats = {config.get(name) for name in ("checkpoint_format", "format")} - {None}
    if len(formats) > 1:
        raise config.error(f"checkpoint_format and format differ: {sorted(map(str, formats))}")
    name = next(iter(formats), "gptq")
    if name not in VERSIONS:
        raise config.error(f"checkpoint_format = {name!r}; read: {', '.join(map(repr, VERSIONS))}")
    for unread in ("is_marlin_format", "rotation", "adapter"):
        if config.get(unread):
            raise config.error(f"{unread} = {config.get(unread)!r} is not read")
    config.one_of("pack_dtype", ("int32",), "int32")
    rules = config.get("dynamic", {})
    if not isinstance(rules, Mapping):
        raise config.error(f"dynamic = {rules!r}; allowed: patterns with settings")
    return Settings(
        VERSIONS[name],
        config.one_of("bits", BITS),
        config.group_size("group_size", -1),
        tuple(_rule(config, pattern, given) for pattern, given in rules.items()),
    )


def _rule(config: Config, pattern: str, given: Any) -> Rule:
    skips = pattern.startswith("-:")
    try:
        compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise config.error(f"dynamic: {pattern!r} is no pattern: {error}") from error
    own = Config(given or {}, f"{config.origin}: dynamic: {pattern!r}")
    own.only(_OF_THE_MAKER | {"bits", "group_size"})
    found: dict[str, Any] = {}
    if "bits" in own.values:
        found["bits"] = own.one_of("bits", BITS)
    if "group_size" in own.values:
        found["group_size"] = own.group_size("group_size")
    return Rule(compiled, skips, found)


def read(module: StoredModule, settings: Settings) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    bits, group = settings.of(module.path)
    scales = module.take_floats("scales", None, None)
    groups, N = scales.shape
    K = _columns(module, bits)
    group = group or K
    if groups != -(-K // group):
        raise module.error("scales", f"{groups} groups, {-(-K // group)} of {group} columns expected")
    qweight = module.take("qweight", torch.int32, words_for(K, bits), N)
    qzeros = module.take("qzeros", torch.int32, groups, words_for(N, bits))
    return Grouped(
        codes=unpack(qweight.t(), bits, K),
        scale=scales.t().contiguous(),
        group=group,
        bits=bits,
        zero_point=_zero_points(qzeros, bits, N, settings.version).t().contiguous(),
        g_idx=_order(module, K, groups, group),
    )


def _columns(module: StoredModule, bits: int) -> int:
    """K: the words along it may have room for a few more."""
    if module.shape is not None:
        return module.shape[1]
    if module.has("g_idx"):
        return module.take("g_idx", (torch.int32, torch.int64), None).shape[0]
    return module.take("qweight", torch.int32, None, None).shape[0] * 32 // bits


def _zero_points(qzeros: Tensor, bits: int, N: int, version: int) -> Tensor:
    if version == 1 and bits in _ONES:
        qzeros = qzeros + _ONES[bits]
    zero_point = unpack(qzeros, bits, N)
    if version == 1 and bits not in _ONES:
        zero_point = (zero_point + 1) & (2**bits - 1)
    return zero_point


def _order(module: StoredModule, K: int, groups: int, group: int) -> Tensor | None:
    """The group of each column, where they do not follow one another."""
    if not module.has("g_idx"):
        return None
    g_idx = module.take_groups("g_idx", K, groups)
    in_order = torch.arange(K, dtype=torch.int32, device=g_idx.device) // group
    return None if g_idx.is_meta or torch.equal(g_idx, in_order) else g_idx
