"""From the neutral form of a weight to compressed-tensors' entries, exactly, and their configuration.

Its files have integers with scales and whole zero points. What has offsets, zero points in float,
codebooks or groups of rows has no such form.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from int8fx.errors import CheckpointError
from int8fx.weights.readers.neutral import DYNAMIC, DYNAMIC_AFFINE, Grouped, Neutral
from int8fx.weights.readers.unpacking import pack

PLAIN, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"
_BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def entries(neutral: Neutral, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a module by the ends of their names, and its group of the configuration.

    Raises:
        CheckpointError: compressed-tensors cannot hold the weight exactly.
    """
    grouped = _whole(neutral, name)
    codes, zero_point, middle = grouped.codes, grouped.zero_point, 2 ** (grouped.bits - 1)
    N, K = codes.shape
    signed = codes.dtype == torch.int8
    if not signed and zero_point is not None and bool((zero_point == middle).all()):
        zero_point = None
    elif not signed and zero_point is None:
        zero_point = torch.zeros_like(grouped.scale, dtype=torch.uint8)
    plain = signed and grouped.bits == 8 and bool(grouped.owner)
    found: dict[str, Tensor] = {"weight_scale": grouped.scale}
    if plain:
        found["weight"] = codes
    else:
        unsigned = (codes.to(torch.int16) + middle).to(torch.uint8) if signed else codes
        found["weight_packed"] = pack(unsigned, grouped.bits)
        found["weight_shape"] = torch.tensor([N, K])
    if zero_point is not None:
        found["weight_zero_point"] = _stored_zero(zero_point, signed, plain, middle, grouped.bits)
    if grouped.g_idx is not None:
        found["weight_g_idx"] = grouped.g_idx
    return found, _group(grouped, zero_point is None, plain)


def _stored_zero(zero_point: Tensor, signed: bool, plain: bool, middle: int, bits: int) -> Tensor:
    if plain:
        return zero_point.to(torch.int8)
    moved = (zero_point.to(torch.int16) + (middle if signed else 0)).to(torch.uint8)
    return pack(moved.t().contiguous(), bits).t().contiguous()


def _whole(neutral: Neutral, name: str) -> Grouped:
    what = ""
    if not isinstance(neutral, Grouped):
        what = f"a weight in {type(neutral).__name__.lower()} form"
    elif neutral.transposed:
        what = "groups of rows"
    elif neutral.offset is not None or (
        neutral.zero_point is not None and neutral.zero_point.is_floating_point()
    ):
        what = "offsets, or zero points in float"
    if what or not isinstance(neutral, Grouped):
        raise CheckpointError(
            f"{name}: {what}, which compressed-tensors cannot hold exactly; int8fx and int8 can"
        )
    return neutral


def _group(grouped: Grouped, symmetric: bool, plain: bool) -> dict[str, Any]:
    channel = grouped.scale.shape[1] == 1
    weights: dict[str, Any] = {
        "num_bits": grouped.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else grouped.group,
        "dynamic": False,
    }
    if grouped.g_idx is not None:
        weights["actorder"] = "group"
    inputs = None
    if plain and grouped.owner in (DYNAMIC, DYNAMIC_AFFINE):
        inputs = {**_BY_TOKEN, "symmetric": grouped.owner == DYNAMIC}
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": PLAIN if plain else PACKED,
    }


def configuration(groups: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """``quantization_config`` of modules and their groups; each group names its modules."""
    alike: list[tuple[dict[str, Any], list[str]]] = []
    for path, group in groups.items():
        targets = next((paths for each, paths in alike if each == group), None)
        if targets is None:
            alike.append((group, [path]))
        else:
            targets.append(path)
    forms = {group["format"] for group, _ in alike}
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(forms)) if len(forms) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": paths, **group} for index, (group, paths) in enumerate(alike)
        },
        "ignore": [],
    }
