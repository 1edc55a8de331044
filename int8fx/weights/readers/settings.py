"""Checks of a file's ``quantization_config``: what is unknown is refused by its name, never guessed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from int8fx.errors import CheckpointError


@dataclass(frozen=True)
class Config:
    """A quantisation configuration, and where it is from.

    Attributes:
        values: as in the file.
        origin: the file, for messages.
    """

    values: Mapping[str, Any]
    origin: str = "quantization_config"

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {what}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def one_of(self, name: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """Raises:
        CheckpointError: the value is none of those.
        """
        value, allowed = self.get(name, default), tuple(allowed)
        # True == 1 in Python, and bits: true is no number of bits.
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise self.error(f"{name} = {value!r}; read: {', '.join(map(repr, allowed))}")
        return value

    def whole(self, name: str, least: int, default: int | None = None) -> int:
        """Raises:
        CheckpointError: the value is no whole number of at least ``least``.
        """
        value = self.get(name, default)
        if type(value) is not int or value < least:
            raise self.error(f"{name} = {value!r}; allowed: a whole number of at least {least}")
        return value

    def group_size(self, name: str, default: int | None = None) -> int:
        """A number of columns; 0: all, which files write as -1 or null."""
        if name in self.values and self.values[name] is None:
            return 0
        value = self.get(name, default)
        if value == -1:
            return 0
        if type(value) is not int or value < 1:
            raise self.error(f"{name} = {value!r}; allowed: a number of columns, or -1 for all")
        return value

    def only(self, known: Iterable[str]) -> None:
        """Raises:
        CheckpointError: there is an option that is not known.
        """
        unknown = sorted(self.values.keys() - set(known))
        if unknown:
            name = unknown[0]
            raise self.error(f"{name} = {self.values[name]!r}: an option that is not known")
