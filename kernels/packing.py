"""Packing: a weight's stored parts to the tensors that a product on its device takes, and back.

    packed = (the integers as the kernel lays them out, the other parts, the format's derived parts)

Where no kernel of a device has a layout for the format, as on the meta device, the integers stay as
they are stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.format import WeightFormat


def pack(weight_format: WeightFormat, stored: Sequence[Tensor], N: int, K: int) -> tuple[Tensor, ...]:
    """What a product takes of a weight ``[N, K]``, or of each of ``[E, N, K]``."""
    codes, *others = stored
    derived = weight_format.derive(stored, N, K)
    return (pack_codes(codes, weight_format.family), *others, *derived)


def pack_codes(codes: Tensor, family: str = table.INT8) -> Tensor:
    """The first part as a kernel takes it; as it is where there is none for it, or nothing in it: of
    few rows or columns, some processes hold none."""
    if 0 in codes.shape or not table.lays_out(codes.device.type, family):
        return codes
    return torch.ops.int8fx.pack_weight(codes, family)


def unpack(weight_format: WeightFormat, packed: Sequence[Tensor], N: int, K: int) -> list[Tensor]:
    """The stored parts of a packed weight, in its memory where they are stored as they are."""
    codes, *others = packed[: len(weight_format.parts)]
    shape = weight_format.parts[0].shape(N, K)
    if 0 in shape or tuple(codes.shape) == shape:
        return [codes, *others]
    return [torch.ops.int8fx.unpack_weight(codes, *shape, weight_format.family), *others]


# --- the operators ``int8fx::pack_weight`` and ``int8fx::unpack_weight`` ------------------------------


def pack_weight(w_int8: Tensor, family: str = table.INT8) -> Tensor:
    packed = table.pack(w_int8, family)
    return packed.clone() if packed is w_int8 else packed  # an output may not alias its input


def pack_weight_fake(w_int8: Tensor, family: str = table.INT8) -> Tensor:
    shape = table.packed_shape(w_int8, family)
    return torch.empty(shape, dtype=w_int8.dtype, device=w_int8.device)


def unpack_weight(weight: Tensor, N: int, K: int, family: str = table.INT8) -> Tensor:
    return table.unpack(weight, N, K, family)


def unpack_weight_fake(weight: Tensor, N: int, K: int, family: str = table.INT8) -> Tensor:
    return torch.empty((N, K), dtype=weight.dtype, device=weight.device)
