"""``int8fx run``: an artefact's model on the terminal. Neither torch nor transformers is imported."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from int8fx.ahead.model import Model, load
from int8fx.bench.progress import step


@dataclass(frozen=True)
class Settings:
    """What the user chose; as ``Model.tokens`` has it."""

    tokens: int
    temperature: float
    top_p: float
    seed: int | None
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def write(directory: Path, prompt: str, how: Settings) -> None:
    """Prints what follows a prompt."""
    model = _load(directory, how)
    _print(model.stream(prompt, **how.to_dict()))


def talk(directory: Path, prompt: str | None, how: Settings, ask: Callable[[str], str] = input) -> None:
    """Answers one question after another, until an empty line or the end of the input.

    Args:
        prompt: the first question, if any.
    """
    model = _load(directory, how)
    messages: list[dict[str, str]] = []
    question = prompt or _asked(ask)
    while question:
        messages.append({"role": "user", "content": question})
        answer = _print(model.chat(messages, **how.to_dict()))
        messages.append({"role": "assistant", "content": answer})
        question = _asked(ask)


def _load(directory: Path, how: Settings) -> Model:
    with step(Console(stderr=True), f"Loading {directory}"):
        return load(directory, threads=how.threads)


def _asked(ask: Callable[[str], str]) -> str:
    try:
        return ask("> ").strip()
    except EOFError:
        return ""


def _print(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        text += piece
    sys.stdout.write("\n")
    return text
