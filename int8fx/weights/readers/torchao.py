"""torchao's safetensors files of integers in plain layouts; the header's metadata says what each is.

IntxUnpackedToInt8Tensor   _weight_qdata [N, K] int8, _weight_scale, _weight_zero_point [N, G]
                           ŵ = (q - z) · scale
Int8Tensor                 _weight_qdata [N, K] int8, _weight_scale [N, 1] or [1, 1]
                           _weight_zero_point (of activations quantised with one: refused)
Int4Tensor                 _weight_qdata [N, K / 2] int8, the even column in the low nibble, signed
                           _weight_scale, _weight_zero_point [G, N]
                           ŵ = q · scale + z: z is in the unit of the weight
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from int8fx.weights.readers.module import FLOATS, StoredModule
from int8fx.weights.readers.neutral import DYNAMIC, Grouped
from int8fx.weights.readers.settings import Config

DATA = "_weight_qdata"
SCALE, ZERO_POINT = "_weight_scale", "_weight_zero_point"
# What a product would have to do as well.
UNREAD = ("_weight_act_pre_scale", "_weight_act_quant_scale", "_weight_act_quant_zero_point")


def settings(config: Config) -> None:
    """Each weight's settings are in the header of the file."""


def read(module: StoredModule, settings: None) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    kind, fields = _described(module)
    for entry in UNREAD:
        if module.has(entry):
            raise module.error(entry, "scales of activations are not read")
    block = fields.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(_is_size(size) for size in block):
        raise module.error(DATA, f"block_size = {block!r}; that of a matrix expected")
    return _KINDS[kind](module, fields, block)


def _described(module: StoredModule) -> tuple[str, Mapping[str, Any]]:
    name = f"{module.path}.weight" if module.path else "weight"
    try:
        said = json.loads(module.metadata[name])
        kind, fields = said["_type"], said["_data"]
        known = kind in _KINDS and isinstance(fields, dict)
    except KeyError as error:
        raise module.error(DATA, f"the header of the file does not describe {name}") from error
    except (ValueError, TypeError) as error:
        raise module.error(DATA, f"damaged: its description in the header: {error}") from error
    if not known:
        raise module.error(DATA, f"a {kind}; read: {', '.join(_KINDS)}")
    return kind, fields


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _named(value: Any) -> Any:
    """Of a description's dtypes and enumerations the name."""
    return value.get("_data") if isinstance(value, Mapping) else value


def _group(module: StoredModule, block: list[int], K: int) -> int:
    if block[0] != 1 or K % block[1]:
        raise module.error(DATA, f"blocks of {block}; read: of one row, and columns that divide K={K}")
    return block[1]


def _intx(module: StoredModule, fields: Mapping[str, Any], block: list[int]) -> Grouped:
    codes = module.take(DATA, torch.int8, None, None)
    N, K = codes.shape
    module.check_matrix(DATA, N, K)
    group = _group(module, block, K)
    bits = _bits(module, _named(fields.get("target_dtype")))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.numel() and not bool(((codes >= low) & (codes <= high)).all()):
        raise module.error(DATA, f"corrupt: an integer outside of {low} to {high}")
    zero_point = module.take(ZERO_POINT, (torch.int8, *FLOATS), N, K // group)
    input_int8 = bool(_named(fields.get("activation_quantization")))
    return Grouped(
        codes=codes,
        scale=module.take_floats(SCALE, N, K // group),
        group=group,
        bits=bits,
        zero_point=zero_point if bool((zero_point != 0).any()) else None,
        owner=DYNAMIC if input_int8 else {},
    )


def _bits(module: StoredModule, name: Any) -> int:
    names = {f"int{bits}": bits for bits in range(1, 9)}
    if name not in names:
        raise module.error(DATA, f"target_dtype = {name!r}; read: {', '.join(names)}")
    return names[name]


def _int8(module: StoredModule, fields: Mapping[str, Any], block: list[int]) -> Grouped:
    codes = module.take(DATA, torch.int8, None, None)
    N, K = codes.shape
    module.check_matrix(DATA, N, K)
    scale = module.take_floats(SCALE)
    if module.has(ZERO_POINT) and bool((module.tensors[ZERO_POINT] != 0).any()):
        raise module.error(ZERO_POINT, "zero points of int8 weights are not read")
    if (block != [1, K] and block != [N, K]) or scale.numel() != (N if block[0] == 1 else 1):
        raise module.error(SCALE, f"{scale.numel()} scales of blocks {block} of {[N, K]}")
    owner = DYNAMIC if fields.get("act_quant_kwargs") else {}
    return Grouped(codes, scale.reshape(-1, 1).expand(N, 1), K, 8, owner=owner)


def _int4(module: StoredModule, fields: Mapping[str, Any], block: list[int]) -> Grouped:
    packed = module.take(DATA, (torch.int8, torch.uint8), None, None).view(torch.uint8)
    N, K = packed.shape[0], packed.shape[1] * 2
    module.check_matrix(DATA, N, K)
    if fields.get("shape") != [N, K]:
        raise module.error(DATA, f"shape = {fields.get('shape')!r}, and its bytes are of {[N, K]}")
    group = _group(module, block, K)
    # Signed nibbles, as int8 and as uint8 with 8 for 0.
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1) ^ 8
    eight = torch.full((N, K // group), 8, dtype=torch.uint8, device=codes.device)
    return Grouped(
        codes=codes,
        scale=_by_row(module, SCALE, K // group, N),
        group=group,
        bits=4,
        zero_point=eight,
        offset=_by_row(module, ZERO_POINT, K // group, N),
    )


def _by_row(module: StoredModule, entry: str, groups: int, N: int) -> Tensor:
    return module.take_floats(entry, groups, N).t().contiguous()


_KINDS = {"IntxUnpackedToInt8Tensor": _intx, "Int8Tensor": _int8, "Int4Tensor": _int4}
