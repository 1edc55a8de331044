"""Tokens to text and back, by the package tokenizers; a chat as one text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from int8fx.ahead.artefact import TOKENIZER, Artefact
from int8fx.errors import ArtefactError, UserError

UNFINISHED = "�"  # what stands for bytes that are no whole character yet


class Text:
    """The tokenizer of an artefact."""

    def __init__(self, artefact: Artefact) -> None:
        """Raises:
        ArtefactError: the tokenizer's file is damaged.
        """
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            install = "python -m pip install tokenizers"
            raise UserError(f"running a model needs the package tokenizers: {install}") from error
        path = artefact.path(TOKENIZER)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ArtefactError(f"{path}: damaged: {error}") from error
        self._chat = artefact.chat

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """Args:
        special: whether the tokens that begin a text are added, where the model has such.
        """
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens, as it grows: pieces of whole characters."""
        # What a token reads as depends on those before it: they are read again, and left out.
        held: list[int] = []
        first = shown = 0
        for token in tokens:
            held.append(token)
            if not (text := self.text(held[first:])).endswith(UNFINISHED):
                yield text[len(self.text(held[first:shown])) :]
                first, shown = shown, len(held)
        yield self.text(held[first:])[len(self.text(held[first:shown])) :]

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation as the model's template writes it, with the answer to come.

        Raises:
            UserError: the model has no template, or it refuses these messages.
        """
        if "template" not in self._chat:
            raise UserError("this model has no chat template: give a prompt, without --chat")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        words = {name: value for name, value in self._chat.items() if name != "template"}
        try:
            template = environment.from_string(self._chat["template"])
            text = template.render(messages=messages, add_generation_prompt=True, **words)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template: {error}") from error
        return self.tokens(text, special=False)


def _refuse(reason: str) -> None:
    import jinja2

    raise jinja2.TemplateError(reason)
