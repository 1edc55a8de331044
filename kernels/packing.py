"""Packing: ``w_int8 [N, K]`` to the form that its device's kernel takes, and back."""

import torch
from torch import Tensor

from int8fx.kernels import table


def _pack_weight(w_int8: Tensor) -> Tensor:
    packed = table.pack(w_int8)
    return packed.clone() if packed is w_int8 else packed  # an output may not alias its input


def _pack_weight_fake(w_int8: Tensor) -> Tensor:
    return torch.empty(table.packed_shape(w_int8), dtype=torch.int8, device=w_int8.device)


def _unpack_weight(weight: Tensor, N: int, K: int) -> Tensor:
    return table.unpack(weight, N, K)


def _unpack_weight_fake(weight: Tensor, N: int, K: int) -> Tensor:
    return torch.empty((N, K), dtype=torch.int8, device=weight.device)
