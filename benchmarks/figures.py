"""Results of benchmarks as plain values for JSON."""

import dataclasses
from typing import Any


def plain(value: Any) -> Any:
    """Dataclasses as dicts, however deep."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value
