"""The neutral form of a quantised weight ``[N, K]``, between a foreign layout and a format of ours.

    Grouped    ŵ[n, k] = (codes[n, k] - zero_point[n, g]) · scale[n, g] + offset[n, g],   g = g_idx[k]
    Coded      ŵ[n, k] = codebook[codes[n, k]] · absmax[(n · K + k) // block]
    Rotated    ŵ rotated by blocks of columns, and Grouped of one group (``kernels/ops/rotation.py``)
    Values     ŵ[n, k] itself: of numbers that are no integers times a scale

``dequantized`` is the reference that the owner's own code is held against: it computes in a dtype of
the caller's choice, as owners compute in 16-bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.ops.rotation import from_regular, rotate_back

INTEGERS = (torch.uint8, torch.int8)
# An owner whose input is int8 by token, without outliers.
DYNAMIC: Mapping[str, Any] = {"scheme": "absmax-vector"}
DYNAMIC_AFFINE: Mapping[str, Any] = {"scheme": "zeropoint-vector"}  # and with zero points


@dataclass(frozen=True)
class Grouped:
    """Integers with a scale for each group.

    Attributes:
        codes: ``[N, K]`` uint8, or int8.
        scale: ``[N, G]``, of the dtype that it has in the file.
        group: how many columns share a scale where ``g_idx`` is None; K: all.
        bits: of a code.
        zero_point: ``[N, G]``, whole numbers or floats; None: 0.
        offset: ``[N, G]`` in the unit of the weight; None: 0.
        g_idx: ``[K]`` int32, the group of each column (act-order).
        transposed: whether all of these are of ŵᵀ, ``[K, N]``: groups run along N.
        owner: the scheme of the owner's products and its settings, where it quantises its input.
    """

    codes: Tensor
    scale: Tensor
    group: int
    bits: int
    zero_point: Tensor | None = None
    offset: Tensor | None = None
    g_idx: Tensor | None = None
    transposed: bool = False
    owner: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        wanted = (rows, -(-columns // self.group))
        if self.g_idx is not None:
            wanted = (rows, self.scale.shape[1])
        for name in ("scale", "zero_point", "offset"):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} of shape {list(tensor.shape)}, {list(wanted)} expected")
        if self.codes.dtype not in INTEGERS:
            raise ValueError(f"codes of {self.codes.dtype}; allowed: uint8, int8")

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, columns = self.codes.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def groups(self) -> Tensor:
        """The group of each column ``[K]``."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group

    @property
    def is_symmetric(self) -> bool:
        return self.zero_point is None and self.offset is None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ ``[N, K]``, computed in ``dtype``: each difference, product and sum rounds to it."""
        groups = self.groups
        w_hat = self.codes.to(dtype)
        if self.zero_point is not None:
            w_hat = w_hat - self.zero_point.to(dtype)[:, groups]
        w_hat = w_hat * self.scale.to(dtype)[:, groups]
        if self.offset is not None:
            w_hat = w_hat + self.offset.to(dtype)[:, groups]
        return w_hat.t().contiguous() if self.transposed else w_hat


@dataclass(frozen=True)
class Coded:
    """Codes of a codebook, with a scale for each ``block`` of consecutive weights, rows end to end.

    Attributes:
        packed: ``[⌈N · K / 2⌉]`` uint8, the first of two codes in the high nibble.
        codebook: ``[16]`` fp32.
        absmax: ``[⌈N · K / block⌉]`` fp32.
        shape: ``(N, K)``.
    """

    packed: Tensor
    codebook: Tensor
    absmax: Tensor
    block: int
    shape: tuple[int, int]
    bits: int = 4

    @property
    def codes(self) -> Tensor:
        """``[N, K]`` uint8."""
        N, K = self.shape
        nibbles = torch.stack([self.packed >> 4, self.packed & 15], -1).flatten()
        return nibbles[: N * K].view(N, K)

    @property
    def group(self) -> int:
        """The most columns that surely share a scale: blocks may begin in the middle of a row."""
        return math.gcd(self.block, self.shape[1])

    def scales_by_row(self) -> Tensor:
        """``absmax`` for each ``group`` columns of each row: ``[N, K / group]``."""
        N, K = self.shape
        first = torch.arange(0, N * K, self.group, device=self.absmax.device)
        return self.absmax[first // self.block].view(N, K // self.group)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ ``[N, K]``: the product is fp32 and rounded once, as bitsandbytes does it."""
        groups = torch.arange(self.shape[1], device=self.packed.device) // self.group
        values = self.codebook.float()[self.codes.long()]
        return (values * self.scales_by_row().float()[:, groups]).to(dtype)


@dataclass(frozen=True)
class Rotated:
    """Int8 of a weight that ConvRot's regular Hadamard matrix has rotated, with a scale a row.

    Attributes:
        codes: ``[N, K]`` int8, in the order of the regular matrix.
        scale: ``[N]`` fp32.
        block: columns that are rotated together.
    """

    codes: Tensor
    scale: Tensor
    block: int
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.codes.shape
        return N, K

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ŵ ``[N, K]``, computed in fp32 and rounded once."""
        K = self.shape[1]
        steps = from_regular(self.codes.float(), K, self.block, "convrot")
        return (rotate_back(steps, K, self.block, "convrot") * self.scale.unsqueeze(1)).to(dtype)


@dataclass(frozen=True)
class Values:
    """Float weights of a format that no integers stand for exactly.

    Attributes:
        weight: ``[N, K]`` fp32.
        bits: of a weight in the file.
    """

    weight: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.weight.shape
        return N, K

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)


Neutral = Grouped | Coded | Rotated | Values
