"""Results: one JSON object a line, written at once, so that a killed step loses what came after.

Every line names its ``step``. The driver's own say how a step ended:
``{"step": "cases", "ended": "done", "seconds": 51.3}``; others end as "failed" or "timed out".
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
Line = dict[str, Any]


def text(step: str, **found: Any) -> str:
    """A line. A number that JSON has no word for is null."""
    return json.dumps({"step": step, **_finite(found)}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def is_line(text: str) -> bool:
    return text.startswith('{"step": ')


def read(path: Path) -> list[Line]:
    """All lines of a file, or of the file in a folder. The last may be cut short.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another line is no JSON.
    """
    path = path / FILE if path.is_dir() else path
    texts = [text for text in path.read_text().splitlines() if text.strip()]
    found = []
    for number, text in enumerate(texts, 1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}: line {number} is no JSON: {text[:80]}") from error
    return found


def latest(found: Iterable[Line]) -> list[Line]:
    """Of each step, what its last run said: one that failed may have been run again."""
    runs: dict[str, list[list[Line]]] = {}
    for line in found:
        of = runs.setdefault(line["step"], [[]])
        of[-1].append(line)
        if "ended" in line:
            of.append([])
    return [line for of in runs.values() for line in next(run for run in reversed(of) if run)]


def of_step(lines: Iterable[Line], step: str) -> Iterator[Line]:
    """What a step has found."""
    return (line for line in lines if line["step"] == step and "ended" not in line)


def done(lines: Iterable[Line]) -> set[str]:
    """Steps that came to their end, and found no fault."""
    return {line["step"] for line in lines if line.get("ended") == "done"}
