"""bitsandbytes' files: NF4 and FP4, their scales in 8 bits or not, and int8.

    weight                                   uint8 [N · K / 2, 1], the first of two in the high nibble;
                                             the same bytes under another dtype (``quant_storage``)
    weight.absmax                            fp32 [blocks], or uint8 of a second codebook
    weight.quant_map                         fp32 [16], the codebook
    weight.quant_state.bitsandbytes__nf4     uint8, JSON
    weight.nested_absmax, .nested_quant_map  of the second codebook

    absmax[i] = nested_quant_map[absmax_uint8[i]] · nested_absmax[i // 256] + nested_offset

and of int8 ``weight [N, K]`` with ``SCB [N]``, ŵ = weight · SCB / 127.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.ops.quantize_reference import QMAX
from int8fx.weights.readers.module import FLOATS, StoredModule
from int8fx.weights.readers.neutral import Coded, Grouped
from int8fx.weights.readers.settings import Config

KINDS = ("nf4", "fp4")
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in KINDS)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STORAGES = (torch.uint8, *FLOATS, torch.int8)
_STATE = frozenset(
    "quant_type blocksize dtype shape nested_blocksize nested_dtype nested_offset".split()
)
_CONFIG = frozenset(
    "quant_method _load_in_4bit _load_in_8bit load_in_4bit load_in_8bit bnb_4bit_compute_dtype "
    "bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant "
    "llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules "
    "llm_int8_threshold".split()
)


def settings(config: Config) -> float:
    """The threshold of int8.

    Raises:
        CheckpointError: an option is unknown, or has a value that is not read.
    """
    config.only(_CONFIG)
    if "bnb_4bit_quant_type" in config.values:
        config.one_of("bnb_4bit_quant_type", KINDS)
    threshold = config.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold < 0:
        raise config.error(f"llm_int8_threshold = {threshold!r}; allowed: a number of at least 0")
    return float(threshold)


def read(module: StoredModule, settings: float) -> Coded | Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    if module.has("SCB"):
        return _int8(module, settings)
    states = [name for name in STATES if module.has(name)]
    if len(states) != 1:
        raise module.error(STATES[0], f"one of {' and '.join(KINDS)} expected")
    state = _state(module, states[0])
    N, K = _shape(module, states[0], state)
    block = _number(module, states[0], state, "blocksize", _BLOCKS)
    blocks = -(-N * K // block)
    return Coded(
        packed=_bytes(module, N, K),
        codebook=module.take_floats("weight.quant_map", 16).float(),
        absmax=_absmax(module, states[0], state, blocks),
        block=block,
        shape=(N, K),
    )


def _int8(module: StoredModule, threshold: float) -> Grouped:
    codes = module.take("weight", torch.int8, None, None)
    scale = module.take_floats("SCB", codes.shape[0]).float() / QMAX
    owner = {"scheme": "llm.int8", "threshold": threshold}
    return Grouped(codes, scale.unsqueeze(1), codes.shape[1], 8, owner=owner)


def _state(module: StoredModule, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(module.take(name, torch.uint8, None).tolist()))
        unknown = sorted(state.keys() - _STATE)
    except (ValueError, AttributeError) as error:
        raise module.error(name, f"damaged: {error}") from error
    kind = name.rpartition("__")[2]
    if unknown or state.get("quant_type") != kind:
        what = f"unknown: {unknown[0]}" if unknown else f"quant_type = {state.get('quant_type')!r}"
        raise module.error(name, what)
    return state


def _shape(module: StoredModule, name: str, state: dict[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))):
        raise module.error(name, f"shape = {shape!r}; read: that of a matrix")
    return shape[0], shape[1]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(
    module: StoredModule, name: str, state: dict[str, Any], field: str, allowed: tuple[int, ...]
) -> int:
    value = state.get(field)
    if type(value) is not int or value not in allowed:
        raise module.error(name, f"{field} = {value!r}; allowed: {', '.join(map(str, allowed))}")
    return value


def _bytes(module: StoredModule, N: int, K: int) -> Tensor:
    stored = module.take("weight", _STORAGES).contiguous().flatten().view(torch.uint8)
    if stored.numel() != -(-N * K // 2):
        raise module.error("weight", f"{stored.numel()} bytes, {-(-N * K // 2)} of {[N, K]} expected")
    return stored


def _absmax(module: StoredModule, name: str, state: dict[str, Any], blocks: int) -> Tensor:
    if not module.has("weight.nested_absmax"):
        return module.take_floats("weight.absmax", blocks).float()
    block = _number(module, name, state, "nested_blocksize", _BLOCKS)
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise module.error(name, f"nested_offset = {offset!r}; a number expected")
    codes = module.take("weight.absmax", torch.uint8, blocks)
    nested = module.take_floats("weight.nested_absmax", -(-blocks // block)).float()
    codebook = module.take_floats("weight.nested_quant_map", 256).float()
    scales = nested[torch.arange(blocks, device=nested.device) // block]
    return codebook[codes.long()] * scales + torch.tensor(offset, dtype=torch.float32)
