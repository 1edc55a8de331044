"""Tensors whose float values are computed when they are read, and lie nowhere that others could share.

``Int8Weight`` is one. A view of it that has no int8 form, as ``weight[0]``, is another: a copy of the
values, to be read. Torch takes it for a view, so a write to it would be lost in silence; it is refused.
"""

import functools
from typing import Any

from torch import Tensor

from int8fx.torch_private import map_tensors, new_wrapper, without_torch_functions


class ComputedValues(Tensor):
    """Whoever would share the memory of the values gets an error, and whoever copies gets a copy.

    Attributes:
        NO_DATA: what the error says.
    """

    NO_DATA: str

    def _read_values(self) -> Tensor:
        """A plain tensor of the values, which nothing else refers to."""
        raise NotImplementedError

    def numpy(self, *, force: bool = False) -> Any:
        """Raises:
        RuntimeError: not forced to copy; what is written to the array would be lost.
        """
        if not force:
            raise RuntimeError(f"{self.NO_DATA}; weight.numpy(force=True) is a copy")
        return self._read_values().numpy(force=True)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """A copy, as ``numpy.asarray`` takes it.

        Raises:
            ValueError: no copy is allowed.
        """
        if copy is False:
            raise ValueError(self.NO_DATA)
        return self._read_values().__array__(dtype)

    def tolist(self) -> Any:
        return self._read_values().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        """Raises:
        RuntimeError: no copy is asked for; what is written to the other tensor would be lost.
        """
        if not options.get("copy"):
            raise RuntimeError(f"{self.NO_DATA}; copy=True makes a copy")
        return self._read_values().__dlpack__(**options)


class ReadOnlyCopy(ComputedValues):
    """The values of an int8 weight through a view that has no int8 form."""

    NO_DATA = (
        "a view of an int8 weight that has no int8 form is a read-only copy: .clone() is one to write "
        "to, and int8fx.dequantize_(model) brings back float weights"
    )
    copied: Tensor

    __torch_function__ = without_torch_functions

    def __new__(cls, values: Tensor) -> "ReadOnlyCopy":
        copy = new_wrapper(cls, values.shape, values.stride(), values.dtype, values.device)
        copy.copied = values
        return copy

    def _read_values(self) -> Tensor:
        return self.copied.clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        refuse_writes(cls, func, args, kwargs or {})
        args, kwargs = map_tensors(cls, lambda copy: copy.copied, (args, kwargs or {}))
        return read_only(func, func(*args, **kwargs))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["copied"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "ReadOnlyCopy":
        return ReadOnlyCopy(inner["copied"])

    def _is_view(self) -> bool:
        # Dynamo would make the weight of it again, and take this view of that.
        return False

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self._read_values()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._read_values().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.copied)


def read_only(func: Any, result: Any) -> Any:
    """What an operator made of computed values: where torch takes it for a view, it is read-only."""
    aliases = (each.alias_info for each in func._schema.returns)
    if any(alias is not None and not alias.is_write for alias in aliases):
        return map_tensors(Tensor, ReadOnlyCopy, result)
    return result


def refuse_writes(kind: type[ComputedValues], func: Any, args: tuple, kwargs: dict) -> None:
    """Raises:
    RuntimeError: an operator would write to a tensor of a kind.
    """
    declared = func._schema.arguments
    given = kwargs | {each.name: value for each, value in zip(declared, args, strict=False)}
    written = [given[each.name] for each in declared if each.is_write and each.name in given]
    map_tensors(kind, functools.partial(_refuse_write, func), written)


def _refuse_write(func: Any, written: Tensor) -> None:
    raise RuntimeError(
        f"{func} would write to an int8 weight of shape {list(written.shape)}, which is "
        "read-only: int8fx.dequantize_(model) brings back a float weight to write to"
    )
