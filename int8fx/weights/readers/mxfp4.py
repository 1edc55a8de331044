"""MXFP4: four-bit floats with a power of two for each 32 along K.

    weight_blocks   [N, K / 32, 16] uint8    two a byte, the first in the low nibble
    weight_scales   [N, K / 32] uint8        the exponent, plus 127

A four-bit float is 0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign: half of a whole number. So the weight is
int8 with scales of 2^(exponent - 1), exactly.
"""

import torch

from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config

GROUP = 32
_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
# The least exponent of a normal fp32 scale, and the byte that stands for NaN.
_LEAST, _NAN = 2, 255


def settings(config: Config) -> None:
    """Raises:
    CheckpointError: an option is unknown.
    """
    config.only(("quant_method", "modules_to_not_convert", "dequantize"))


def read(module: StoredModule, settings: None) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    blocks = module.take("weight_blocks", torch.uint8, None, None, GROUP // 2)
    N, groups, _ = blocks.shape
    exponents = module.take("weight_scales", torch.uint8, N, groups)
    if bool((exponents == _NAN).any()):
        raise module.error("weight_scales", "corrupt: an exponent of 255, which stands for NaN")
    if bool((exponents < _LEAST).any()):
        raise module.error(
            "weight_scales", "an exponent below -125, where fp32 loses bits, is not read"
        )
    numbers = [*_HALVES, *(-each for each in _HALVES)]
    table = torch.tensor(numbers, dtype=torch.int8, device=blocks.device)
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).view(N, groups * GROUP)
    scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 128)
    return Grouped(table[nibbles.long()], scale, GROUP, 8)
