"""A model from an artefact: ``int8fx.load(folder)``.

    model = int8fx.load("smollm2")
    print(model.generate("The capital of France is", max_new_tokens=8))

Its weights are mapped from the file, so a second process that runs the same artefact shares them.
"""

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from int8fx.ahead import artefact as files
from int8fx.ahead.artefact import DECODE, PREFILL, Artefact
from int8fx.ahead.cache import Cache
from int8fx.ahead.mapped import MappedFile
from int8fx.ahead.native import Libraries, Program
from int8fx.ahead.text import Text
from int8fx.errors import UserError

NEW_TOKENS = 256


class Model:
    """A causal language model with its KV cache and tokenizer.

    One text is generated at a time: the next one ends that before it.

    Attributes:
        artefact: what was loaded.
    """

    def __init__(self, artefact: Artefact, threads: int | None = None) -> None:
        """Args:
        threads: of the kernels; by default as many as torch takes.

        Raises:
            ArtefactError: a file is damaged, cannot be loaded, or may not be.
        """
        self.artefact = artefact
        self._text = Text(artefact)
        libraries = Libraries(artefact)
        if threads is not None:
            libraries("threads", threads)
        self._weights = MappedFile(artefact.path(files.WEIGHTS))
        self._cache = Cache(artefact.buffers, artefact.context)
        memory = self._weights.tensors | self._cache.memory
        self._programs = {
            name: Program(libraries, name, graph, memory, artefact.vocabulary)
            for name, graph in artefact.programs.items()
        }
        self._lock = threading.Lock()
        self._turn = object()

    def generate(self, prompt: str | Sequence[int], **how: Any) -> str:
        """The text that follows a prompt; see ``tokens`` for the arguments."""
        return self._text.text(list(self.tokens(prompt, **how)))

    def stream(self, prompt: str | Sequence[int], **how: Any) -> Iterator[str]:
        """The same in pieces, as they come."""
        return self._text.pieces(self.tokens(prompt, **how))

    def chat(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> Iterator[str]:
        """The answer to a conversation, in pieces, as they come.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and the answers in between, oldest first.
                What it has in common with the last call is not computed again.
        """
        return self.stream(self._text.chat(messages), **how)

    def tokens(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """The tokens that follow a prompt, as they come: until one that ends a text, which is left out.

        Args:
            prompt: a text, or its tokens.
            max_new_tokens: the cache's end comes first if the prompt leaves less room.
            temperature: 0 takes the most likely token; above it, tokens are drawn, the more evenly the
                higher it is.
            top_p: draws from the most likely tokens whose probabilities add up to this.
            seed: of what is drawn; None, another at each call.

        Raises:
            UserError: an argument is out of range, or the prompt is empty or does not fit the cache.
        """
        _check(max_new_tokens, temperature, top_p)
        given = self._text.tokens(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(given)
        return self._generate(given, max_new_tokens, _Choice(temperature, top_p, seed))

    def _check_prompt(self, tokens: list[int]) -> None:
        context, vocabulary = self.artefact.context, self.artefact.vocabulary
        if not tokens:
            raise UserError("an empty prompt: give at least one token")
        if len(tokens) >= context:
            raise UserError(
                f"a prompt of {len(tokens)} tokens: the cache holds {context}, one of them for an "
                "answer; int8fx compile --context N makes a longer one"
            )
        if not all(0 <= each < vocabulary for each in tokens):
            raise UserError(f"tokens are whole numbers from 0 to {vocabulary - 1}")

    def _generate(self, given: list[int], most: int, choose: Callable[[Program], int]) -> Iterator[int]:
        turn = self._turn = object()
        token = choose(self._run(turn, self._cache.unknown(given)))
        for done in range(1, most + 1):
            if token in self.artefact.stop:
                return
            yield token
            if done == most or self._cache.is_full:
                return
            token = choose(self._run(turn, [token]))

    def _run(self, turn: object, tokens: list[int]) -> Program:
        """Runs what comes behind the tokens of the cache."""
        with self._lock:
            if turn is not self._turn:
                raise UserError(
                    "another text was begun, and a model generates one at a time: load it twice"
                )
            program = self._programs[DECODE if len(tokens) == 1 else PREFILL]
            program(tokens)
            self._cache.add(tokens)
            return program


class _Choice:
    """The next token from a program's logits."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._random = random.Random(seed)

    def __call__(self, program: Program) -> int:
        if self._temperature == 0:
            return program.most_likely()
        return program.sampled(self._temperature, self._top_p, self._random.random())


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: allowed are whole numbers from 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: allowed are numbers from 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: allowed are numbers above 0 and up to 1")


def load(folder: str | Path, *, threads: int | None = None) -> Model:
    """A model that ``int8fx compile`` wrote; nothing is compiled, and torch is not imported.

    Args:
        folder: that ``int8fx compile`` was given as ``--out``.
        threads: of the kernels; by default as many as torch takes.

    Raises:
        ArtefactError: the folder is no artefact, is damaged, was made for another machine, torch or
            int8fx, or somebody else can have written it: names the file, or what does not match.

    Examples:
        >>> import int8fx
        >>> int8fx.load("none")
        Traceback (most recent call last):
        int8fx.errors.ArtefactError: none: no folder that int8fx compile wrote: int8fx.json is not there
    """
    return Model(files.read(folder), threads)
