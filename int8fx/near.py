"""A warning of patterns that match no linear of a model, with names that are near."""

import difflib
import fnmatch
import re
import warnings
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from int8fx.options import Options

MOST = 3  # names that are shown
ALIKE = 0.6  # of two parts of a path, as difflib has it


def warn_of_unused(options: Options, model: nn.Module, stacklevel: int) -> None:
    """Warns of each of the user's patterns that matches nothing in a model that has a weight.

    Args:
        stacklevel: of ``warnings.warn``, seen from the caller.
    """
    paths = [name.removesuffix(".weight") for name in _names(model)]
    for option, pattern in options.patterns:
        if not fnmatch.filter(paths, pattern):
            warnings.warn(
                f"{option}: {pattern!r} matches no linear of {type(model).__name__}"
                f"{_hint(pattern, paths)}",
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def _names(model: nn.Module) -> Iterator[str]:
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not name.endswith("bias"):
            yield name
    for name, _ in model.named_buffers(remove_duplicate=False):
        yield name


def _hint(pattern: str, paths: Sequence[str]) -> str:
    for meant in _meant(pattern, paths):
        count = len(fnmatch.filter(paths, meant))
        if count:
            return f"; {meant!r} matches {count}"
    # Of layers that differ in a number alone, one is enough.
    kinds = {re.sub(r"\d+", "", path): path for path in reversed(paths)}.values()
    found = difflib.get_close_matches(pattern, kinds, MOST, 0.0)
    return f"; the nearest: {', '.join(map(repr, found))}" if found else ""


def _meant(pattern: str, paths: Sequence[str]) -> Iterator[str]:
    """Patterns that the user may have meant, the likeliest first."""
    yield f"{pattern}.*"  # a module, for the linears in it
    spelled = ".".join(
        _spelled(part, {each for path in paths for each in path.split(".")})
        for part in pattern.split(".")
    )
    for each in dict.fromkeys((spelled, pattern)):
        yield each
        yield each.removeprefix("*.")
        yield f"*.{each}"
        yield f"{each}.*"
        yield f"*.{each}.*"


def _spelled(part: str, known: Collection[str]) -> str:
    """A part of a path as the model spells it, where that is nearly so."""
    if part in known or not re.search(r"\w", part):
        return part
    return next(iter(difflib.get_close_matches(part, known, 1, ALIKE)), part)
