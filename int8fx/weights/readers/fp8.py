"""Weights in float8 with a scale for each block, as in DeepSeek's and transformers' ``fp8`` files.

    weight             [N, K] float8_e4m3fn
    weight_scale_inv   [⌈N / n⌉, ⌈K / k⌉]      ŵ = weight · scale of its block of n rows and k columns

No integers stand for them exactly: the weight is made int8 as a float weight is.
"""

import torch

from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Values
from int8fx.weights.readers.settings import Config

FLOAT8 = (torch.float8_e4m3fn,)
_CONFIG = frozenset(
    "quant_method weight_block_size activation_scheme fmt modules_to_not_convert dequantize scale_fmt "
    "ignored_layers".split()
)


def settings(config: Config) -> tuple[int, int] | None:
    """Rows and columns of a block; None: one for all.

    Raises:
        CheckpointError: an option is unknown, or has a value that is not read.
    """
    config.only(_CONFIG)
    config.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    config.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    config.one_of("scale_fmt", ("float",), "float")
    block = config.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(_is_size(each) for each in block)
    ):
        raise config.error(f"weight_block_size = {block!r}; two numbers expected")
    return block[0], block[1]


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def read(module: StoredModule, settings: tuple[int, int] | None) -> Values:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    return values(module, "weight_scale_inv", settings)


def values(module: StoredModule, scale_name: str, block: tuple[int, int] | None) -> Values:
    """ŵ, in fp32, of blocks; without, of one scale for all, or one a row.

    Raises:
        CheckpointError: names the tensor, and what is wrong with it.
    """
    weight = module.take("weight", FLOAT8, None, None)
    N, K = weight.shape
    if block is None:
        scale = module.take_floats(scale_name).float()
        if scale.numel() not in (1, N):
            raise module.error(scale_name, f"{scale.numel()} scales, 1 or {N} expected")
        scale = scale.view(-1, 1)
    else:
        rows, columns = block
        scale = module.take_floats(scale_name, -(-N // rows), -(-K // columns)).float()
        scale = scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    w_hat = weight.float().mul_(scale)
    if not w_hat.is_meta and not w_hat.isfinite().all():
        raise module.error("weight", "corrupt: a value that is not finite")
    return Values(w_hat, 8)
