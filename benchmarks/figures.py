"""What benchmarks share: the names that a user chooses, and results as plain values for JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import typer


def choose(what: str, given: str, allowed: Mapping[str, Any]) -> list[str]:
    """The names in a comma-separated list, or all."""
    names = list(allowed) if given == "all" else given.split(",")
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise typer.BadParameter(f"unknown {what}: {unknown}; allowed: {list(allowed)}")
    return names


def plain(value: Any) -> Any:
    """Dataclasses as dicts, however deep."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value
