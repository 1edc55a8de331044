"""ComfyUI's int8 files: the weight as it is, or rotated by ConvRot.

    weight          [N, K] int8
    weight_scale    one for all, or [N]
    comfy_quant     uint8, JSON: {"format": "int8_tensorwise", "convrot": true,
                    "convrot_groupsize": 256}

A rotated weight is kept rotated (``int8fx/weights/convrot.py``).
"""

import json
from typing import Any

import torch

from int8fx.kernels.ops.rotation import allowed_blocks
from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import DYNAMIC, Grouped, Rotated
from int8fx.weights.readers.settings import Config

FORMAT = "int8_tensorwise"
MARKER = "comfy_quant"
_KNOWN = frozenset(("format", "convrot", "convrot_groupsize", "per_row", "full_precision_matrix_mult"))


def settings(config: Config) -> None:
    """Each module's settings are beside its weight."""


def read(module: StoredModule, settings: None) -> Grouped | Rotated:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    said = _said(module)
    codes = module.take("weight", torch.int8, None, None)
    N, K = codes.shape
    scale = module.take_floats("weight_scale").float()
    if scale.numel() not in (1, N):
        raise module.error("weight_scale", f"{scale.numel()} scales, 1 or {N} expected")
    scale = scale.view(-1, 1).expand(N, 1)
    if not said.get("convrot"):
        return Grouped(codes, scale, K, 8, owner=DYNAMIC)
    block = said.get("convrot_groupsize", 256)
    if block not in allowed_blocks("convrot") or K % block:
        raise module.error(
            MARKER, f"groups of {block!r} of K={K}; allowed: {allowed_blocks('convrot')}"
        )
    return Rotated(codes, scale.squeeze(1), block)


def _said(module: StoredModule) -> dict[str, Any]:
    try:
        said = json.loads(bytes(module.take(MARKER, torch.uint8, None).tolist()))
        unknown = sorted(said.keys() - _KNOWN)
    except (ValueError, AttributeError) as error:
        raise module.error(MARKER, f"damaged: {error}") from error
    if said.get("format") != FORMAT:
        raise module.error(MARKER, f"format = {said.get('format')!r}; read: {FORMAT!r}")
    if unknown:
        raise module.error(MARKER, f"{unknown[0]} = {said[unknown[0]]!r}: an option that is not known")
    return said
