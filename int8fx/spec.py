"""A scheme with settings in one text, as the command line has it: ``llm.int8,threshold=3``."""

from typing import Any

from int8fx.errors import UserError
from int8fx.kernels.schemes.table import SCHEMES


def scheme_and_settings(spec: str, asked: str) -> tuple[str, dict[str, Any]]:
    """The name of a scheme, and its settings, unchecked.

    Args:
        asked: what the text was given to, for messages.

    Raises:
        UserError: names a setting that the scheme does not read, and those that it does.
    """
    name, *settings = spec.split(",")
    found: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        reads = sorted(_settings_of(name))
        if not separator or key not in reads:
            raise UserError(
                f"{asked} {spec}: {setting!r} is no setting that it reads; allowed: "
                f"{', '.join(f'{each}=...' for each in reads) or 'none'}"
            )
        found[key] = _value(value)
    return name, found


def _settings_of(name: str) -> set[str]:
    """The settings of a scheme, and a calibration for its columns."""
    reads = set(SCHEMES[name].reads) if name in SCHEMES else set()
    return reads | ({"calibration"} if "columns" in reads else set())


_FLAGS = {"true": True, "false": False}


def _value(text: str) -> Any:
    """A setting as it is typed: a flag, a number, or else a name."""
    if text.lower() in _FLAGS:
        return _FLAGS[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
