"""A calibration: which columns of each linear's input are largest, as a small JSON file.

Columns with ``|x|`` far above the others are the same few for every token. A few tokens show them,
and schemes with ``columns`` keep them in 16-bit (``kernels/schemes/rotated.py``). ``int8fx.calibrate``
makes one, the option ``calibration`` takes it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from int8fx.errors import CalibrationError
from int8fx.kernels.schemes.static_columns import MOST_COLUMNS

_FORMAT, _VERSION = "int8fx calibration", 1


@dataclass(frozen=True)
class CalibratedLinear:
    """One linear.

    Attributes:
        path: of its module, as reports have it.
        shape: ``(N, K)`` of its weight, of each of them where there are experts.
        columns: of its input, those with the largest ``|x|`` first; none where it did not run.
        absmax: ``|x|`` of each.
    """

    path: str
    shape: tuple[int, int]
    columns: tuple[int, ...]
    absmax: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What ``int8fx.calibrate`` saw of one model.

    Attributes:
        model: its class, for messages.
        rows: rows of x that its busiest linear had.
        linears: all that it has.

    Examples:
        >>> import int8fx, pathlib, tempfile, torch
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "calibration.json"
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> int8fx.calibrate(model, [torch.ones(4, 64)]).save(file)
        >>> int8fx.Calibration.load(file).rows
        4
    """

    model: str
    rows: int
    linears: tuple[CalibratedLinear, ...]

    def __repr__(self) -> str:
        return f"<Calibration of a {self.model}: {len(self.linears)} linears, {self.rows} rows>"

    def columns_of(self, path: str, shape: tuple[int, int], count: int) -> tuple[int, ...]:
        """The columns to keep of a linear, ascending, at most ``count``.

        Args:
            shape: ``(N, K)`` of its weight.

        Raises:
            CalibrationError: this is another model's: names the linear, and what differs.
        """
        found = [linear for linear in self.linears if linear.path == path]
        for linear in found:
            if linear.shape == shape:
                return tuple(sorted(linear.columns[:count]))
        if found:
            N, K = found[0].shape
            raise CalibrationError(
                f"{path}: N={shape[0]}, K={shape[1]} in the model, N={N}, K={K} in the calibration, "
                f"which is of a {self.model}; int8fx.calibrate(model, batches) makes one of this model"
            )
        raise CalibrationError(
            f"{path}: a linear of the model that is not in the calibration, which is of a {self.model} "
            f"with {self._names()}; int8fx.calibrate(model, batches) makes one of this model"
        )

    def _names(self) -> str:
        first = ", ".join(linear.path for linear in self.linears[:3])
        return f"{len(self.linears)} linears ({first}{', ...' if len(self.linears) > 3 else ''})"

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {"format": _FORMAT, "version": _VERSION} | asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file."""
        content = self.to_dict()
        Path(path).write_text(json.dumps(content, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Reads what ``save`` wrote.

        Raises:
            CalibrationError: the file is none, or damaged, or of a later version.
            FileNotFoundError: it is not there.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CalibrationError(f"{path}: no calibration: {error}") from error
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Any) -> "Calibration":
        """The same of the file's content.

        Raises:
            CalibrationError: as ``load``.
        """
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise CalibrationError(f"no calibration: its 'format' is not {_FORMAT!r}")
        if content.get("version") != _VERSION:
            given = content.get("version")
            raise CalibrationError(f"a calibration of version {given!r}; allowed: {_VERSION}")
        try:
            linears = tuple(_linear(each) for each in content["linears"])
            return cls(str(content["model"]), int(content["rows"]), linears)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"a damaged calibration: {error!r}") from error


def _linear(content: Mapping[str, Any]) -> CalibratedLinear:
    (N, K), columns = content["shape"], _integers(content["columns"])
    absmax = tuple(float(value) for value in content["absmax"])
    if len(columns) > MOST_COLUMNS or len(absmax) != len(columns) or len(set(columns)) < len(columns):
        raise ValueError(f"{content['path']}: {len(columns)} columns, {len(absmax)} values")
    if not all(0 <= column < K for column in columns):
        raise ValueError(f"{content['path']}: a column that is not among {K}")
    return CalibratedLinear(str(content["path"]), (int(N), int(K)), columns, absmax)


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise ValueError(f"{values!r}: allowed are whole numbers")
    return tuple(values)


# --- batches ---------------------------------------------------------------------------------------


def calls_of(batches: Any) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The arguments of a model's call for each of some batches, by position and by name.

    Raises:
        TypeError: ``batches`` is a single tensor or dict.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; needed is an iterable of batches, each a tensor, "
            "a tuple of arguments, or a dict of keyword arguments"
        )
    for batch in batches:
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            yield (batch if isinstance(batch, tuple) else (batch,)), {}
