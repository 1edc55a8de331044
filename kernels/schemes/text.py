"""A scheme and its settings as operators take them: texts."""

import json
from dataclasses import asdict

from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import scheme_named


def as_text(choice: Choice) -> tuple[str, str]:
    """The scheme's name, and its settings as JSON."""
    return choice.scheme.name, json.dumps(asdict(choice.settings))


def choice_of(scheme: str, settings: str) -> Choice:
    """The inverse.

    Raises:
        ValueError: there is no such scheme, or setting of it.
    """
    return scheme_named(scheme).choice(**json.loads(settings))
