"""How a GPU keeps a weight: rows of a length that 16 divides, so that all of them start aligned.

Otherwise each element of a row would be a load of one byte. Past K there are zeros; x is given zeros
there as well, which are no outliers and change no scale (``padded_rows``).
"""

import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 16  # bytes of a vector load, and of an asynchronous copy


def packed_shape(N: int, K: int) -> tuple[int, int]:
    return N, -(-K // _ALIGNED) * _ALIGNED


def pack(w_int8: Tensor) -> Tensor:
    """``w_int8 [N, K]`` as ``[N, K']``, itself where 16 divides K."""
    return padded_rows(w_int8)


def unpack(weight: Tensor, N: int, K: int) -> Tensor:
    return weight[:, :K].contiguous()


def padded_rows(x: Tensor) -> Tensor:
    """``x [*, K]`` with zeros up to a length that 16 divides, itself where it is one."""
    missing = packed_shape(1, x.shape[-1])[1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x
