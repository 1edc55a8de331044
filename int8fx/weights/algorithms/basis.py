"""The matrix that a scheme's integers stand for, and the rows that it meets.

Of most schemes it is the weight. A rotated weight is rotated, without the columns that stay in 16-bit,
and so is each row of x; both then have the product that they had before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.codes import pack_bits
from int8fx.kernels.ops.rotation import NONE, rotate, rotate_weight, rotated_columns
from int8fx.kernels.schemes.scheme import Choice
from int8fx.weights.algorithms.grid import Codes, Grid


@dataclass(frozen=True)
class Basis:
    """Of a scheme whose weights have groups along K (``kernels/schemes/grouped.py``)."""

    choice: Choice

    @property
    def _settings(self) -> Any:
        return self.choice.settings

    @property
    def _rotates(self) -> bool:
        return getattr(self._settings, "rotation", NONE) != NONE

    @property
    def _columns(self) -> list[int]:
        return list(getattr(self._settings, "columns", ()))

    @property
    def _keeps_columns(self) -> bool:
        """Whether a part of the format has the columns that stay in 16-bit, which may be none."""
        return any(part.name == "columns" for part in self.choice.weight_format.parts)

    def columns(self, K: int) -> int:
        """Of the matrix."""
        return rotated_columns(K, self._settings.block, self._settings.rotation) if self._rotates else K

    def grid(self, dtype: torch.dtype) -> Grid:
        """Of a weight of a dtype."""
        settings = self._settings
        bits = self.choice.weight_format.bits
        return Grid(bits, settings.group_size, settings.zeros, settings.act_order, dtype)

    def matrix(self, weight: Tensor) -> Tensor:
        """``[N, K]`` of a weight ``[N, K]``, in fp32."""
        return self._turned(weight, rotate_weight)

    def rows(self, x: Tensor) -> Tensor:
        """``[M, K]`` of ``x [*, K]``, in fp32."""
        return self._turned(x.reshape(-1, x.shape[-1]), rotate)

    def _turned(self, rows: Tensor, turn: Any) -> Tensor:
        rest = rows.detach().float()
        if self._columns:
            rest = rest.index_fill(1, torch.tensor(self._columns, device=rest.device), 0)
        return turn(rest, self._settings.block, self._settings.rotation) if self._rotates else rest

    def stored(self, weight: Tensor, found: Codes) -> Sequence[Tensor]:
        """The parts of the scheme's format."""
        settings, weight_format = self._settings, self.choice.weight_format
        K = weight.shape[1]
        codes = F.pad(found.codes, (0, -found.codes.shape[1] % max(settings.group_size, 1)))
        stored = [pack_bits(codes, weight_format.bits), *found.parts]
        if settings.act_order:
            in_order = torch.arange(K, dtype=torch.int32, device=weight.device)
            stored.append(in_order if found.order is None else found.order)
        if getattr(settings, "column_scale", False):
            ones = torch.ones_like(weight[0])
            stored.append(ones if found.column_scale is None else found.column_scale)
        if self._keeps_columns:
            at = torch.tensor(self._columns, dtype=torch.int64, device=weight.device)
            stored.append(weight.detach().index_select(1, at))
        return stored
