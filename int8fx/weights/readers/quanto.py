"""optimum-quanto's files: the weights of its frozen modules, and ``quanto_qmap.json``.

qint8           weight._data        [N, K] int8       weight._scale [N, 1]      ŵ = data · scale
qint4, qint2    weight._data._data  uint8, of rows of one group each: the first half (quarter) of the
                                    rows in the low bits
                weight._scale, weight._shift [N · K / g, 1]
                ŵ = data · scale - shift with a float shift, (data - shift) · scale with an integer
input_scale, output_scale           of activations, where these are quantised
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.weights.readers.module import FLOATS, StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config

BITS = {"qint8": 8, "qint4": 4, "qint2": 2}
MAP = "quanto_qmap.json"


@dataclass(frozen=True)
class Settings:
    """Attributes:
    bits: of each module's weight.
    """

    bits: Mapping[str, int]


def settings(config: Config) -> Settings:
    """Of the map of modules.

    Raises:
        CheckpointError: a module has weights or activations that are not read.
    """
    bits: dict[str, int] = {}
    for path, given in config.values.items():
        own = Config(given if isinstance(given, Mapping) else {}, f"{config.origin}: {path}")
        own.only(("weights", "activations"))
        bits[path] = BITS[own.one_of("weights", BITS)]
        own.one_of("activations", ("none",), "none")
    return Settings(bits)


def read(module: StoredModule, settings: Settings) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    bits = settings.bits.get(module.path)
    if bits is None:
        raise module.error("weight", f"quantised, and not in {MAP}")
    if bits == 8:
        codes = module.take("weight._data", torch.int8, None, None)
        scale = module.take_floats("weight._scale")
        if scale.numel() not in (1, codes.shape[0]):
            raise module.error(
                "weight._scale", f"{scale.numel()} scales, 1 or {codes.shape[0]} expected"
            )
        return Grouped(codes, scale.view(-1, 1).expand(codes.shape[0], 1), codes.shape[1], 8)
    return _affine(module, bits)


def _affine(module: StoredModule, bits: int) -> Grouped:
    if module.shape is None:
        raise module.error("weight", "its shape is not in the file: give the model")
    N, K = module.shape
    packed = module.take("weight._data._data", torch.uint8, None, None)
    group = packed.shape[1]
    if K % group or packed.shape[0] != -(-N * K // group // (8 // bits)):
        what = f"shape {list(packed.shape)} in the checkpoint holds no weight {[N, K]} of {bits} bits"
        raise module.error("weight._data._data", what)
    groups = K // group
    scale = module.take_floats("weight._scale", N * groups, 1).view(N, groups)
    shift = module.take("weight._shift", (*FLOATS, torch.int8, torch.uint8), N * groups, 1)
    codes = _rows(packed, bits)[: N * groups].reshape(N, K)
    if not shift.dtype.is_floating_point:
        return Grouped(codes, scale, group, bits, zero_point=shift.view(N, groups))
    offset = -module.take_floats("weight._shift").view(N, groups)
    return Grouped(codes, scale, group, bits, offset=offset)


def _rows(packed: Tensor, bits: int) -> Tensor:
    """The first rows are in the low bits."""
    return torch.cat([packed >> start & (2**bits - 1) for start in range(0, 8, bits)], 0)
