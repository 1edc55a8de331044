"""EETQ's int8 files, whose weights are permuted for CUTLASS's kernels from sm_75 to sm_89.

    weight          [K, N] int8, permuted
    weight_scales   [N]                   ŵ = w_int8 · scale, of -128 to 127

Its ``cutlass_preprocessors.cc`` makes ``weight`` of ``w_int8ᵀ [K, N]`` in four steps, which are undone
in the opposite order:

    1. of each 16 rows, row i becomes that of ``_ROWS[i]``
    2. the matrix is transposed, to [N, K]
    3. 64 columns of row 2n are followed by the same 64 of row 2n + 1
    4. 128 is added to each, and the bytes 1 and 2 of each four are exchanged
"""

import torch
from torch import Tensor

from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config

_ROWS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
_TILE = 64
_EXCHANGED = (0, 2, 1, 3)


def settings(config: Config) -> None:
    """Raises:
    CheckpointError: an option is unknown, or has a value that is not read.
    """
    config.only(("quant_method", "weights", "modules_to_not_convert"))
    config.one_of("weights", ("int8",), "int8")


def read(module: StoredModule, settings: None) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    weight = module.take("weight", torch.int8, None, None)
    K, N = weight.shape
    if K % _TILE or N % 2:
        raise module.error("weight", f"[K={K}, N={N}]: EETQ's K is a multiple of {_TILE}, N of 2")
    scales = module.take_floats("weight_scales", N)
    return Grouped(in_order(weight), scales.unsqueeze(1), K, 8)


def in_order(weight: Tensor) -> Tensor:
    """``w_int8 [N, K]`` of EETQ's ``[K, N]``."""
    K, N = weight.shape
    stored = weight.contiguous().view(torch.uint8).view(-1, 4)[:, _EXCHANGED]
    signed = (stored ^ 0x80).view(torch.int8)
    rows = signed.view(N // 2, K // _TILE, 2, _TILE).transpose(1, 2).reshape(N, K // 16, 16)
    found = torch.empty_like(rows)
    found[..., _ROWS] = rows
    return found.view(N, K)
