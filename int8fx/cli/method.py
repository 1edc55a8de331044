"""``--method``: which algorithm chooses a weight's integers, and the text that it sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from int8fx.cli.arguments import PANEL, positive
from int8fx.errors import UserError

NEAREST = "rtn"
TOKENS, LENGTH = 4096, 512
_NAMES = "rtn (round-to-nearest), hqq, gptq or awq"

MethodOption = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"How integers are chosen: {_NAMES}.", rich_help_panel=PANEL),
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"How integers are chosen: {_NAMES}; several are compared.",
        rich_help_panel=PANEL,
    ),
]
MethodTextOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="UTF-8 text that gptq and awq see.", rich_help_panel=PANEL),
]
MethodTokensOption = Annotated[
    int,
    typer.Option(
        parser=positive, metavar="N", help="How many tokens of it, at most.", rich_help_panel=PANEL
    ),
]


@dataclass(frozen=True)
class Chosen:
    """One algorithm, as ``int8fx.quantize_`` takes it.

    Attributes:
        options: of the weights, with the settings that the algorithm asks for.
        words: the text that it sees; None: it sees none.
    """

    method: str
    options: Mapping[str, Any]
    words: str | None = None
    tokens: int = TOKENS

    def batches(self, tokenizer: Any, device: Any) -> list[dict[str, Any]] | None:
        """The text in windows, as a causal language model is called with them.

        Raises:
            UserError: it is too short.
        """
        if self.words is None:
            return None
        import torch

        token_ids = torch.tensor(tokenizer(self.words)["input_ids"], device=device)
        if token_ids.numel() < 2:
            raise UserError(f"--method-text has {token_ids.numel()} tokens; at least 2 are needed")
        parts = token_ids[: self.tokens].split(LENGTH)
        return [{"input_ids": part[None], "use_cache": False} for part in parts]


def chosen(
    name: str, options: Mapping[str, Any], text: Path | None, tokens: int, needs_text: bool = False
) -> Chosen:
    """What was asked for, checked before a model is loaded.

    Args:
        needs_text: whether the text that ships here will not do.

    Raises:
        UserError: names the algorithm, what it was asked to do and what is allowed.
    """
    from int8fx.options import Options
    from int8fx.weights.algorithms.methods import METHODS

    if name == NEAREST:
        return Chosen(name, options)
    if name not in METHODS:
        raise UserError(f"--method {name}: allowed are {', '.join((NEAREST, *METHODS))}")
    method, served = METHODS[name], schemes_of(name)
    for choice in Options.parse(options).choices:
        if choice.scheme.name not in served:
            raise UserError(
                f"--method {name} does not serve {choice.scheme.name}; it serves {', '.join(served)}"
            )
    options = {**method.settings, **options}
    for choice in Options.parse(options).choices:
        refusal = method.refusal(choice)
        if refusal:
            raise UserError(f"--method {name} with {choice.scheme.name}: {refusal}")
    if not method.needs_batches:
        return Chosen(name, options)
    if text is None and needs_text:
        raise UserError(f"--method {name} needs --method-text FILE, other text than is judged")
    return Chosen(name, options, _read(text), tokens)


def check_text(names: list[str], text: Path | None) -> None:
    """Raises:
    UserError: none of these algorithms reads a text, and one was given.
    """
    from int8fx.weights.algorithms.methods import METHODS

    if text is not None and not any(n in METHODS and METHODS[n].needs_batches for n in names):
        readers = " and ".join(name for name, method in METHODS.items() if method.needs_batches)
        raise UserError(f"--method-text {text}: {', '.join(names)} reads no text; {readers} do")


def schemes_of(name: str) -> list[str]:
    """The schemes that an algorithm serves; round-to-nearest serves every one."""
    from int8fx.kernels.schemes.table import SCHEMES
    from int8fx.weights.algorithms.methods import METHODS

    if name not in METHODS:
        return list(SCHEMES)
    method, served = METHODS[name], []
    for scheme in SCHEMES.values():
        settings = {key: value for key, value in method.settings.items() if key in scheme.reads}
        if not method.refusal(scheme.choice(**settings)):
            served.append(scheme.name)
    return served


def _read(text: Path | None) -> str:
    from int8fx.bench import texts

    try:
        words = texts.read(text)
    except UserError as error:
        raise UserError(str(error).replace("--text", "--method-text", 1)) from error
    if not words.strip():
        raise UserError(f"--method-text {text}: an empty file")
    return words
