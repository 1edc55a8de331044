"""A model and the text it is run on, as the commands take them."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from int8fx import models, smollm2
from int8fx.errors import UserError
from int8fx.evaluate import sample_text


def load(name: str | None, progress: Console) -> tuple[Any, Any]:
    """A model, on a GPU if there is one, and its tokenizer; None is SmolLM2-135M-Instruct.

    Raises:
        UserError: the model cannot be loaded, and why.
    """
    model, tokenizer = smollm2.load(progress) if name is None else models.load(name, progress)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_with_tokens(name: str | None, text: Path | None, progress: Console) -> tuple[Any, Tensor]:
    """A model and the token ids ``[T]`` of a text, on its device; None is the sample text.

    Raises:
        UserError: the model or the text cannot be used, and why.
    """
    words = read(text)  # before the model, which may take a while
    model, tokenizer = load(name, progress)
    token_ids = torch.tensor(tokenizer(words)["input_ids"], device=model.device)
    if token_ids.numel() < 2:
        raise UserError(f"--text {text} has {token_ids.numel()} tokens; at least 2 are needed")
    return model, token_ids


def read(path: Path | None) -> str:
    """The text of a file, or the sample text."""
    if path is None:
        return sample_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: {error}") from error
