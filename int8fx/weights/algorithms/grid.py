"""What an algorithm gets of a weight, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE = -1  # as a group: all columns


@dataclass(frozen=True)
class Grid:
    """The integers that a format has for a weight.

    Attributes:
        bits: of a code.
        group: how many columns share a scale, or ``WHOLE``.
        zeros: what stands for 0, as of ``kernels/formats/grouped.py``.
        act_order: whether columns may be put in another order before they are grouped.
        dtype: of scales, and of zero points in float.
    """

    bits: int
    group: int
    zeros: str
    act_order: bool
    dtype: torch.dtype

    def width(self, K: int) -> int:
        return K if self.group == WHOLE else self.group


@dataclass(frozen=True)
class Codes:
    """A quantised matrix ``[N, K]``.

    Attributes:
        codes: ``[N, K]`` uint8, columns in the order of ``order``.
        parts: ``scale [N, G]``, and zero points or offsets ``[N, G]`` where ``zeros`` has some.
        order: ``[K]``: which column of the matrix each is; None: as they are.
        column_scale: ``[K]``: what a row of x is multiplied by before the product; None: nothing.
    """

    codes: Tensor
    parts: Sequence[Tensor]
    order: Tensor | None = None
    column_scale: Tensor | None = None
