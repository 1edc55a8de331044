"""ConvRot's int8 files, as ComfyUI writes them: read as ``int8-rotated`` weights, and written.

    weight          [N, K] int8, the weight times the regular Hadamard matrix, block by block
    weight_scale    one for all, or [N]
    comfy_quant     uint8, JSON: {"format": "int8_tensorwise", "convrot": true,
                    "convrot_groupsize": 256}

The numbers are those of ``int8-rotated`` with ``rotation="convrot"`` and ``block`` the group size, but
for the order and the signs of rotated columns (``kernels/ops/rotation.py``), which are exact to change.
So ``load_checkpoint`` and ``load_state_dict`` take such files into a model that was quantised so.
"""

import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.errors import CheckpointError
from int8fx.kernels.ops.rotation import allowed_blocks, block_of, from_regular, to_regular
from int8fx.kernels.schemes.table import scheme_named
from int8fx.weights.tensor import QuantizedWeight

FORMAT = "int8_tensorwise"
_ROTATIONS = ("convrot", "hadamard")  # the same matrix


def marker_of(key: str) -> str:
    """The name of the entry that says how the weight ``key`` is kept."""
    owner = key.rpartition(".")[0]
    return f"{owner}.comfy_quant" if owner else "comfy_quant"


def as_ours(key: str, weight: QuantizedWeight, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``state_dict`` whose entry for ``key`` is in our form, if it is in ConvRot's.

    Raises:
        CheckpointError: it is another of ComfyUI's formats, or does not fit the weight.
    """
    marker = state.get(marker_of(key))
    w_int8 = state.get(key)
    if marker is None or w_int8 is None or marker.is_meta or w_int8.is_meta:
        return state
    block = _group_size(marker_of(key), marker)
    if tuple(w_int8.shape) != (weight.N, weight.K) or w_int8.dtype != torch.int8:
        raise CheckpointError(
            f"{key}: {w_int8.dtype} of shape {list(w_int8.shape)} in the checkpoint, int8 of "
            f"{[weight.N, weight.K]} in the model"
        )
    if block_of(weight.K, block, "convrot") != block:
        raise CheckpointError(f"{key}: groups of {block} in the checkpoint do not divide K={weight.K}")
    scale = state.get(key + "_scale")
    if scale is None or scale.numel() not in (1, weight.N):
        raise CheckpointError(f"{key}_scale: one scale or {weight.N} expected")
    ours = scheme_named("int8-rotated").choice(block=block, rotation=_rotation_of(weight))
    said = {"scheme": ours.scheme.name, "settings": asdict(ours.settings)}
    entries = {
        f"{key}_int8": from_regular(w_int8, weight.K, block, "convrot"),
        f"{key}_scale": scale.to(torch.float32).flatten().expand(weight.N).contiguous(),
        f"{key}_columns": torch.empty(weight.N, 0, dtype=weight.dtype),
        f"{key}_scheme": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
    }
    return ChainMap(entries, state)  # type: ignore[arg-type]


def _rotation_of(weight: QuantizedWeight) -> str:
    rotation = getattr(weight.choice.settings, "rotation", "")
    return rotation if rotation in _ROTATIONS else _ROTATIONS[0]


def _group_size(name: str, marker: Tensor) -> int:
    try:
        said = json.loads(bytes(marker.tolist()))
        block = said.get("convrot_groupsize", 256)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{name}: damaged: {error}") from error
    if said.get("format") != FORMAT or said.get("convrot") is not True:
        raise CheckpointError(f"{name}: {said}; of ComfyUI's formats {FORMAT} with convrot is read")
    if block not in allowed_blocks("convrot"):
        raise CheckpointError(f"{name}: groups of {block}; allowed: {allowed_blocks('convrot')}")
    return block


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's ``state_dict`` with its rotated weights in ConvRot's form.

    Raises:
        ValueError: a weight is kept otherwise; it is named.
    """
    state = dict(model.state_dict())
    for key, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, QuantizedWeight):
            for name in [name for name in state if name == key or name.startswith(f"{key}_")]:
                del state[name]
            state |= entries(key, weight)
    return state


def entries(key: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What ConvRot's files hold of a weight.

    Raises:
        ValueError: it has static columns, another rotation, or blocks that ConvRot has not.
    """
    settings: Any = weight.choice.settings
    rotation = getattr(settings, "rotation", "none")
    fits = rotation in _ROTATIONS and not settings.columns and not weight.transposed
    block = block_of(weight.K, settings.block, rotation) if fits else 0
    if block not in allowed_blocks("convrot") or weight.K % block:
        raise ValueError(
            f"{key} is {weight.weight_format.name}; ConvRot's files hold int8-rotated weights without "
            f"columns, in blocks of {', '.join(map(str, allowed_blocks('convrot')))} that divide K"
        )
    w_int8, w_scale, _ = weight.stored()
    said = {"format": FORMAT, "convrot": True, "convrot_groupsize": block, "per_row": True}
    marker = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return {
        key: to_regular(w_int8, weight.K, block, "convrot"),
        f"{key}_scale": w_scale.clone(),
        marker_of(key): marker,
    }
