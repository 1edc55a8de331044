"""A weight format: which tensors a float weight ``[N, K]`` is stored as, and how they follow its axes.

    w ≈ dequantize(quantize(w), N, K)

What is stored does not depend on a device or a kernel: it is what ``state_dict``, pickles and other
processes see. A kernel may want one of the parts laid out otherwise, and more parts that are computed
from the stored ones (``kernels/packing.py``).

Each dimension of a part follows an axis of the weight, or has a size of its own. So one rule says which
piece of each part belongs to some rows and columns of the weight: for slices, shards, and checks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TENSOR, CHANNEL = "tensor", "channel"


@dataclass(frozen=True)
class Axis:
    """A dimension of a part that follows an axis of the weight.

    Attributes:
        name: ``"N"`` or ``"K"``.
        divisor: how many rows or columns of the weight share one index of the part.
        multiple: what the axis is padded to before it is divided.
    """

    name: str
    divisor: int = 1
    multiple: int = 1

    @property
    def step(self) -> int:
        """Where the axis may be cut: at multiples of it."""
        return math.lcm(self.divisor, self.multiple)

    def length(self, size: int) -> int:
        """Of the part's dimension, for an axis of ``size``."""
        return -(-size // self.step) * (self.step // self.divisor)

    def cut(self, piece: slice) -> slice:
        """The piece of the part's dimension that belongs to a piece of the axis."""
        return slice(piece.start // self.divisor, self.length(piece.stop))


ROWS = Axis("N")
COLUMNS = Axis("K")


@dataclass(frozen=True)
class Part:
    """One tensor of a format.

    Attributes:
        name: as ``scale``; a ``state_dict`` holds it under ``weight_scale``.
        dtype: None: a floating one, that of the float weight.
        dims: an ``Axis``, or a size, for each dimension.
        of_all_columns: whether its values are about K as a whole, as indices of columns are: a weight
            that has such a part is cut along N alone.
    """

    name: str
    dtype: torch.dtype | None
    dims: tuple[Axis | int, ...]
    of_all_columns: bool = False

    def shape(self, N: int, K: int) -> tuple[int, ...]:
        sizes = {"N": N, "K": K}
        return tuple(dim.length(sizes[dim.name]) if isinstance(dim, Axis) else dim for dim in self.dims)

    def piece(self, rows: slice, columns: slice) -> tuple[slice, ...]:
        """The index of what belongs to some rows and columns of the weight."""
        pieces = {"N": rows, "K": columns}
        return tuple(
            dim.cut(pieces[dim.name]) if isinstance(dim, Axis) else slice(None) for dim in self.dims
        )

    def dim_of(self, axis: str) -> int | None:
        """Which of its dimensions follows an axis, if one does."""
        followed = [dim.name if isinstance(dim, Axis) else "" for dim in self.dims]
        return followed.index(axis) if axis in followed else None


Quantize = Callable[[Tensor], tuple[Tensor, ...]]
Dequantize = Callable[[Sequence[Tensor], int, int], Tensor]


def nothing(stored: Sequence[Tensor], N: int, K: int) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class WeightFormat:
    """How a float weight ``[N, K]`` is stored.

    Attributes:
        name: for people, and the part of a store's key that says which form this is. Two formats of one
            name are the same.
        parts: what is stored, the integers first.
        quantize: ``weight [N, K]`` of any floating dtype to the parts.
        dequantize: ``(parts, N, K)`` to ŵ ``[N, K]`` fp32, a new tensor; in fp64 of scales in fp64.
        bits: of an integer.
        granularity: what shares a scale: ``"tensor"``, ``"channel"``, or a number of weights along K.
        zero_point: whether a part of that name says which integer stands for 0.
        codebook: the ``2**bits`` values that integers stand for, where these are no multiples of the
            scale.
        family: what the kernel table knows the layout of the parts by, whatever their numbers mean.
        stored_as: the name of the format whose files this one reads and writes; by default its own.
        derived: parts that a product needs, and that nothing stores.
        derive: ``(parts, N, K)`` to them.
    """

    name: str
    parts: tuple[Part, ...]
    quantize: Quantize
    dequantize: Dequantize
    bits: int = 8
    granularity: str | int = CHANNEL
    zero_point: bool = False
    codebook: tuple[float, ...] | None = None
    family: str = ""
    stored_as: str = ""
    derived: tuple[Part, ...] = ()
    derive: Callable[[Sequence[Tensor], int, int], tuple[Tensor, ...]] = nothing

    def __post_init__(self) -> None:
        stored = [part.name for part in self.parts]
        if self.zero_point and "zero_point" not in stored:
            raise ValueError(f"weight format {self.name!r} has zero points, and no part 'zero_point'")
        if self.codebook is not None and len(self.codebook) != 2**self.bits:
            raise ValueError(
                f"weight format {self.name!r} has a codebook of {len(self.codebook)} values, for "
                f"integers of {self.bits} bits; allowed: {2**self.bits}"
            )
        names = list(self.packed_names)
        follow = [part for part in self.parts if part.dims[:1] == (ROWS,)]
        if len(set(names)) != len(names) or not self.parts or not follow:
            raise ValueError(
                f"weight format {self.name!r} has the parts {names}: their names have to differ, and "
                "one of those that are stored has to have the rows of the weight"
            )

    @property
    def files(self) -> str:
        """The name of what is stored: formats with the same read each other's files."""
        return self.stored_as or self.name

    @property
    def kind(self) -> str:
        """As messages call a weight: ``int8``, ``4-bit``."""
        return "int8" if self.bits == 8 else f"{self.bits}-bit"

    @property
    def a_weight(self) -> str:
        """The same with its article."""
        return f"{'an' if self.bits == 8 else 'a'} {self.kind} weight"

    @functools.cached_property
    def packed_names(self) -> tuple[str, ...]:
        """Of the tensors that a product takes."""
        return tuple(part.name for part in (*self.parts, *self.derived))

    def rows(self, packed: Sequence[Tensor]) -> int:
        """N of a packed weight ``[N, K]``: a kernel lays out no part but the first."""
        tensors = list(zip(self.parts, packed, strict=False))
        return next(t.shape[0] for part, t in reversed(tensors) if part.dims[:1] == (ROWS,))

    def matrix_of(self, packed: Sequence[Tensor], e: int) -> list[Tensor]:
        """The packed form of one of E matrices, of stacked parts; what is derived may be of all."""
        parts = (*self.parts, *self.derived)
        return [
            tensor if index >= len(self.parts) and tensor.dim() == len(part.dims) else tensor[e]
            for index, (part, tensor) in enumerate(zip(parts, packed, strict=True))
        ]

    def shapes(self, N: int, K: int) -> tuple[tuple[int, ...], ...]:
        return tuple(part.shape(N, K) for part in self.parts)

    def zeros(
        self, N: int, K: int, dtype: torch.dtype, device: torch.device, batch: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Parts without values yet, of a float weight of ``dtype``; of several matrices, stacked."""
        return [
            torch.zeros(*batch, *part.shape(N, K), dtype=part.dtype or dtype, device=device)
            for part in self.parts
        ]

    # --- cutting ---------------------------------------------------------------------------------

    @property
    def column_step(self) -> int:
        """K is cut at multiples of it; 0: nowhere."""
        if any(part.of_all_columns for part in self.parts):
            return 0
        return self._step("K", self.granularity if isinstance(self.granularity, int) else 1)

    @property
    def row_step(self) -> int:
        """N is cut at multiples of it."""
        return self._step("N", 1)

    def _step(self, axis: str, least: int) -> int:
        dims = (dim for part in self.parts for dim in part.dims if isinstance(dim, Axis))
        return math.lcm(least, *(dim.step for dim in dims if dim.name == axis))

    def can_cut(self, rows: slice, columns: slice, N: int, K: int) -> bool:
        """Whether each part has a piece that belongs to these rows and columns, and to no others."""
        steps = ((rows, self.row_step, N), (columns, self.column_step, K))
        return all(_falls_on(piece, step, size) for piece, step, size in steps)

    def cut(self, parts: Sequence[Tensor], rows: slice, columns: slice) -> list[Tensor]:
        """The parts of some rows and columns, as copies; ``can_cut`` says whether they are."""
        return [
            tensor[part.piece(rows, columns)].clone(memory_format=torch.contiguous_format)
            for part, tensor in zip(self.parts, parts, strict=True)
        ]


def _falls_on(piece: slice, step: int, size: int) -> bool:
    if (piece.start, piece.stop) == (0, size):
        return True
    return step > 0 and piece.start % step == 0 and (piece.stop % step == 0 or piece.stop == size)


def stacked(weight_format: WeightFormat, weight: Tensor) -> tuple[Tensor, ...]:
    """The parts of a weight ``[N, K]``; of experts ``[E, N, K]`` those of each, stacked."""
    if weight.dim() == 2:
        return weight_format.quantize(weight)
    each = [weight_format.quantize(matrix) for matrix in weight]
    return tuple(torch.stack(tensors) for tensors in zip(*each, strict=True))
