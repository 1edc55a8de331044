"""Settings of a scheme: a frozen dataclass whose fields have a default and a check.

    @dataclass(frozen=True)
    class Settings:
        group_size: int = setting(128, multiple_of(16))

The names of the fields are options of the backend, of ``int8fx.quantize_`` and of rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Check = Callable[[Any], Any]


class NotAllowed(ValueError):
    """A check refuses a value. Its text says what is allowed."""


@dataclass(frozen=True)
class NoSettings:
    """Of a scheme that has none."""


def setting(default: Any, check: Check | None = None) -> Any:
    """A field of a dataclass of settings.

    Args:
        check: gives the value back, as the scheme takes it, or raises ``NotAllowed``. By default values
            of the default's type are allowed.
    """
    return field(default=default, metadata={"check": check or of_type(type(default))})


def of_type(kind: type) -> Check:
    def check(value: Any) -> Any:
        # bool is an int to isinstance.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise NotAllowed(f"a value of type {kind.__name__}")
        return value

    return check


def one_of(*allowed: str) -> Check:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise NotAllowed(" or ".join(map(repr, allowed)))
        return value

    return check


def multiple_of(factor: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % factor:
            raise NotAllowed(f"a multiple of {factor}")
        return value

    return check


def whole_number(least: int, most: int) -> Check:
    """From ``least`` to ``most``, both among them."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise NotAllowed(f"a whole number from {least} to {most}")
        return value

    return check


def threshold(value: Any) -> float:
    # bool is an int to isinstance, and threshold=True is a mistake. NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise NotAllowed(
            "a number >= 0; 0 means no decomposition, float('inf') that nothing is an outlier"
        )
    return float(value)


def names_of(settings: type) -> frozenset[str]:
    return frozenset(each.name for each in fields(settings))


def checks_of(settings: type) -> Mapping[str, Check]:
    """The check of each field; of one without ``setting``, that of its default's type."""
    return {
        each.name: each.metadata.get("check") or of_type(type(each.default))
        for each in fields(settings)
    }


def checked_setting(asked: str, value: Any, check: Check) -> Any:
    """Raises:
    ValueError: names what was asked for, what was given and what is allowed.
    """
    try:
        return check(value)
    except NotAllowed as allowed:
        raise not_allowed(asked, value, str(allowed)) from None


def not_allowed(asked: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{asked}: given {value!r} ({type(value).__name__}); allowed: {allowed}")
