"""A model and the text it is run on, as the commands take them."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from int8fx.analysis.metrics import sample_text
from int8fx.bench import models, smollm2
from int8fx.errors import UserError
from int8fx.weights.quantize import first_int8


def load(name: str | None, progress: Console, *, int8: bool = False) -> tuple[Any, Any]:
    """A model, on a GPU if there is one, and its tokenizer; None is SmolLM2-135M-Instruct.

    Args:
        int8: whether a model will do that has no float weights any more.

    Raises:
        UserError: the model cannot be loaded, and why.
    """
    model, tokenizer = smollm2.load(progress) if name is None else models.load(name, progress)
    if not int8 and first_int8(model):
        raise UserError(
            f"model {name}: {first_int8(model)} is quantised already, and the float model is what "
            "is compared with; give that"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_with_tokens(
    name: str | None, text: Path | None, progress: Console, *, int8: bool = False
) -> tuple[Any, Tensor]:
    """A model and the token ids ``[T]`` of a text, on its device; None is the sample text.

    Args:
        int8: as of ``load``.

    Raises:
        UserError: the model or the text cannot be used, and why.
    """
    model, _, token_ids = load_with_text(name, text, progress, int8=int8)
    return model, token_ids


def load_with_text(
    name: str | None, text: Path | None, progress: Console, *, int8: bool = False
) -> tuple[Any, Any, Tensor]:
    """The same, and the tokenizer between them."""
    words = read(text)  # before the model, which may take a while
    model, tokenizer = load(name, progress, int8=int8)
    token_ids = torch.tensor(tokenizer(words)["input_ids"], device=model.device)
    if token_ids.numel() < 2:
        raise UserError(f"--text {text} has {token_ids.numel()} tokens; at least 2 are needed")
    return model, tokenizer, token_ids


def read(path: Path | None) -> str:
    """The text of a file, or the sample text."""
    if path is None:
        return sample_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: {error}") from error
