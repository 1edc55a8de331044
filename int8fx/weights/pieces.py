"""Slices of a quantised weight: packed anew, and written to the whole when they are written to."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from int8fx.kernels import packing
from int8fx.kernels.formats.format import Part
from int8fx.torch_private import WeakView


class Piece:
    """Which rows and columns of another weight's matrix a slice is. It does not keep that alive."""

    def __init__(self, whole: Any, rows: slice, columns: slice) -> None:
        tensors = [WeakView(tensor) for tensor in whole.tensors]
        self._format = whole.weight_format
        self._targets = [(tensors, (whole.N, whole.K), rows, columns)]
        # A slice of a slice is one of what that is a slice of.
        for tensors, form, outer_rows, outer_columns in getattr(whole.part_of, "_targets", ()):
            inside = _within(outer_rows, rows), _within(outer_columns, columns)
            self._targets.append((tensors, form, *inside))

    def write(self, *stored: Tensor) -> None:
        """Raises:
        RuntimeError: it shares a part with others that it does not have, as some columns of rows with
            one scale do, and that part is another one; nothing is written.
        """
        changed = []
        for views, (N, K), rows, columns in self._targets:
            tensors = [view.tensor() for view in views]
            if any(tensor is None for tensor in tensors):
                continue
            whole = self._merged(tensors, (N, K), rows, columns, stored)  # type: ignore[arg-type]
            changed.append((tensors, whole, N, K))
        for tensors, whole, N, K in changed:
            for tensor, new in zip(tensors, packing.pack(self._format, whole, N, K), strict=True):
                tensor.copy_(new)  # type: ignore[union-attr]

    def _merged(
        self,
        packed: Sequence[Tensor],
        form: tuple[int, int],
        rows: slice,
        columns: slice,
        stored: Sequence[Tensor],
    ) -> list[Tensor]:
        """The stored parts of the whole, with those of the slice in their place."""
        whole = [part.clone() for part in packing.unpack(self._format, packed, *form)]
        index = self._format.parts[0].piece(rows, columns)
        others = whole[0].clone()
        others[index] = 0
        for part, old, new in zip(self._format.parts, whole, stored, strict=True):
            place = part.piece(rows, columns)
            shared = _is_shared(part, form, rows, columns)
            if shared and not _may_change(part, old[place], new, others, index[0]):
                raise RuntimeError(
                    f"columns {columns.start} to {columns.stop} of {self._format.a_weight} of "
                    f"{form[0]} rows cannot take values with other {part.name}s: a row has one "
                    f"{part.name} for all of its columns. A checkpoint of shards is read into shards "
                    "along the same dimension; int8fx.dequantize_(model) before it is saved lifts that"
                )
            old[place] = new
        return whole


def _may_change(part: Part, old: Tensor, new: Tensor, others: Tensor, rows: slice) -> bool:
    """Whether a part can be replaced without a change of other integers that it is of: where it differs
    they are all zero, as in a weight that is yet to be loaded, and mean the same by any scale."""
    differs = old != new
    if part.dim_of("N") != 0:
        return not (differs.any() and others.any())
    return not others[rows][differs.reshape(len(differs), -1).any(1)].any()


def _is_shared(part: Part, form: tuple[int, int], rows: slice, columns: slice) -> bool:
    """Whether a part is that of other rows or columns as well."""
    pieces = {"N": (rows, form[0]), "K": (columns, form[1])}
    return any(
        part.dim_of(axis) is None and (piece.start, piece.stop) != (0, size)
        for axis, (piece, size) in pieces.items()
    )


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)
