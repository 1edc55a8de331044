"""Slices of an int8 weight: packed anew, and written to the whole when they are written to."""

from typing import Any

from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.ops import int8_linear as ops
from int8fx.torch_private import (
    WeakView,
)


class Part:
    """Which rows and columns of another weight's ``w_int8`` a slice is. It does not keep it alive."""

    def __init__(self, whole: Any, rows: slice, columns: slice) -> None:
        form = whole.w_scale.shape[0], whole.K
        self._targets = [(WeakView(whole.packed), WeakView(whole.w_scale), form, rows, columns)]
        # A slice of a slice is one of what that is a slice of.
        for packed, w_scale, form, outer_rows, outer_columns in getattr(whole.part_of, "_targets", ()):
            inside = _within(outer_rows, rows), _within(outer_columns, columns)
            self._targets.append((packed, w_scale, form, *inside))

    def write(self, w_int8: Tensor, w_scale: Tensor) -> None:
        """Raises:
        RuntimeError: it is some columns of rows, whose scales are others; nothing is written.
        """
        found = []
        for packed, scales, (N, K), rows, columns in self._targets:
            whole, whole_scale = packed.tensor(), scales.tensor()
            if whole is None or whole_scale is None:
                continue
            whole_int8 = ops.unpack_weight(whole, N, K)
            whole_int8[rows, columns] = 0
            if whole_int8[rows][whole_scale[rows] != w_scale].any():
                raise RuntimeError(
                    f"columns {columns.start} to {columns.stop} of an int8 weight of {N} rows cannot "
                    "take values with other scales: a row has one scale for all of its columns. A "
                    "checkpoint of shards is read into shards along the same dimension; "
                    "int8fx.dequantize_(model) before it is saved lifts that"
                )
            found.append((whole, whole_int8, whole_scale, rows, columns))
        for whole, whole_int8, whole_scale, rows, columns in found:
            whole_int8[rows, columns] = w_int8
            whole.copy_(pack(whole_int8))
            whole_scale[rows] = w_scale


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def pack(w_int8: Tensor) -> Tensor:
    """``w_int8 [N, K]`` for the kernel of its device; as it is where there is none (meta), or nothing
    in it: of few rows or columns, some processes hold none."""
    if table.kernel_for(w_int8.device.type) is None or 0 in w_int8.shape:
        return w_int8
    return ops.pack_weight(w_int8)
