"""One model under different compilers: the same forward, the same KV cache, timed in turns.

Every contender runs two graphs, and only two, because a compile takes up to a minute:

- **prefill**: ``n`` tokens into an empty static KV cache. It gives the logits at the positions it
  is asked for, whose number is left dynamic: two when timed, all of them for the perplexity.
- **decode**: one token. The cache keeps its length in a tensor, so no step compiles again.

A prompt goes through the decode graph token by token: a prompt has any length, and each length
would be one more graph.
"""

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import int8fx
from int8fx import torch_private
from int8fx.bench.progress import step
from int8fx.torch_private import compile_counts

# generate() wants the last position's logits alone. Dynamo makes a dimension of size 1 a constant,
# and the perplexity's graph would be another one: so one position more, of hundreds.
LAST = 2

# As a table's column has room for them.
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

ROUNDS = 5
STEPS = 16


class Contender:
    """A model, how it is compiled, and its KV cache.

    Attributes:
        name, how: what it is called and how it runs, for people.
        weight_bytes: of the weights that its forward reads; known after ``warm_up``.
        graphs, graph_breaks: what Dynamo made of it; known after ``warm_up``.
        report: of the int8 backend, when it is that.
    """

    def __init__(
        self,
        name: str,
        how: str,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        capacity: int,
        batch: int = 1,
    ) -> None:
        """
        Args:
            forward: what runs the model: itself, or what torch.compile made of it.
            capacity: how many tokens the KV cache holds, for each of ``batch`` sequences.
        """
        self.name = name
        self.how = how
        self.weight_bytes = weight_bytes(model, None)
        self.graphs = 0
        self.graph_breaks = 0
        self.report: int8fx.Report | None = None
        self.compiled = forward is not model
        self._device = next(model.parameters()).device
        self._model = model
        self._forward = forward
        self._cache = empty_cache(model, capacity, batch, self._device)

    def warm_up(self, token_ids: Tensor, on_graph: Callable[[int], None]) -> None:
        """Compiles both graphs; tells how many are done."""
        before = compile_counts()
        with int8fx.collect_reports() as reports:
            token = self.prefill(token_ids)
            on_graph(1)
            self.decode(token)
            on_graph(2)
        graphs, breaks = compile_counts()
        self.graphs, self.graph_breaks = graphs - before[0], breaks - before[1]
        if reports:
            # Both graphs read the same packed weights.
            self.report = reports[0]
            self.weight_bytes = weight_bytes(self._model, self.report)

    def logits(self, token_ids: Tensor) -> Tensor:
        """``[B, n] -> [B, n, V]``, from an empty cache."""
        self._cache.reset()
        return self._prefill(token_ids, token_ids.shape[1])

    def prefill(self, token_ids: Tensor) -> Tensor:
        """Fills the cache with ``token_ids [B, n]``; the most likely next tokens, ``[B, 1]``."""
        self._cache.reset()
        return _most_likely(self._prefill(token_ids, LAST))

    def _prefill(self, token_ids: Tensor, positions: int) -> Tensor:
        length = token_ids.shape[1]
        wanted = torch.arange(length - positions, length, device=self._device)
        torch_private.mark_dynamic(wanted, 0, 2, length)
        return self._run(token_ids, wanted)

    def decode(self, tokens: Tensor) -> Tensor:
        """Adds ``tokens [B, 1]`` to the cache; the most likely next ones, ``[B, 1]``."""
        return _most_likely(self._run(tokens, 1))

    def _run(self, token_ids: Tensor, positions: int | Tensor) -> Tensor:
        # no_grad rather than inference_mode: inference tensors carry no version, by which the
        # backend sees that a weight was edited.
        with torch.no_grad():
            return self._forward(
                input_ids=token_ids.to(self._device),
                use_cache=True,
                logits_to_keep=positions,
                **{cache_argument(self._model): self._cache},
            ).logits

    def generate(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        stop: Iterable[int],
        on_token: Callable[[int], None],
    ) -> list[int]:
        """Greedy decoding: at most ``new_tokens`` token ids, up to and without a stop token."""
        self._cache.reset()
        stop = frozenset(stop)
        token = -1
        for done, given in enumerate(prompt, start=1):
            token = self._decode_one(given)
            on_token(done)
        generated: list[int] = []
        while token not in stop:
            generated.append(token)
            on_token(len(prompt) + len(generated))
            if len(generated) == new_tokens:
                break
            token = self._decode_one(token)
        return generated

    def _decode_one(self, token: int) -> int:
        return int(self.decode(torch.tensor([[token]], device=self._device)))


def _most_likely(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its KV cache: releases after 5.24 warn of the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def empty_cache(model: PreTrainedModel, capacity: int, batch: int, device: torch.device) -> StaticCache:
    """A cache that knows the model's head counts and dtype: one eager step allocates it.

    Allocated while Dynamo traces, its tensors could not be marked as static addresses.
    """
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    with torch.no_grad():
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        model(input_ids=tokens, **{cache_argument(model): cache})
    cache.reset()
    return cache


def weight_bytes(model: PreTrainedModel, report: int8fx.Report | None) -> int:
    """Bytes of the weights that a forward reads; a weight that several modules share counts once.

    Under llmint8, an int8 weight and its scales stand for the float one. The float one stays in
    memory, for whoever else reads it; that is the process's size, not the forward's.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if report is None else total - report.float_bytes + report.int8_bytes


def line_up(
    model: PreTrainedModel, capacity: int, options: Mapping[str, Any] | None = None
) -> list[Contender]:
    """The model as loaded, a bf16 copy under Inductor, and both under llmint8.

    Args:
        options: of llmint8.
    """
    dtype = next(model.parameters()).dtype
    short = SHORT.get(dtype, str(dtype).removeprefix("torch."))
    choices = int8fx.Options.parse(options or {}).choices
    kept = ", ".join(dict.fromkeys(choice.weight_format.kind for choice in choices))

    def compiled(name: str, how: str, model: PreTrainedModel, backend: str) -> Contender:
        more: dict[str, Any] = {"options": dict(options)} if options and backend == "llmint8" else {}
        forward = torch.compile(model, backend=backend, dynamic=False, **more)
        return Contender(name, how, model, forward, capacity)

    half = in_bfloat16(model)
    found = [
        Contender("as loaded", f"{short}, eager", model, model, capacity),
        compiled("Inductor", "bf16", half, "inductor"),
        compiled("llmint8", f"{kept} + {short}", model, "llmint8"),
    ]
    if dtype != torch.bfloat16:
        found.append(compiled("llmint8 bf16", f"{kept} + bf16", half, "llmint8"))
    return found


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its floating parameters in bf16.

    Buffers stay: ``model.to(torch.bfloat16)`` would round the rotary frequencies too, which loading
    a checkpoint in bf16 does not do.
    """
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return copied


@dataclass(frozen=True)
class Speed:
    """Tokens per second, each from a median."""

    prefill: float
    decode: float


def measure(
    contenders: Sequence[Contender],
    token_ids: Tensor,
    *,
    rounds: int,
    steps: int,
    on_round: Callable[[int], None],
) -> dict[str, Speed]:
    """Times a prefill and ``steps`` decode steps of each contender, in turns, ``rounds`` times.

    In turns, so that a machine that slows down for a while does so for all of them.
    """
    prefills: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    decodes: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for done in range(1, rounds + 1):
        for contender in contenders:
            start = time.perf_counter()
            token = contender.prefill(token_ids)
            prefills[contender.name].append(time.perf_counter() - start)
            for _ in range(steps):
                start = time.perf_counter()
                token = contender.decode(token)
                decodes[contender.name].append(time.perf_counter() - start)
        on_round(done)
    length = token_ids.shape[1]
    return {
        name: Speed(
            prefill=length / statistics.median(prefills[name]),
            decode=1 / statistics.median(decodes[name]),
        )
        for name in prefills
    }


def warm_up(contenders: Sequence[Contender], token_ids: Tensor, progress: Console) -> None:
    """Compiles them all, with a bar for each."""
    for contender in contenders:
        verb = "Compiling" if contender.compiled else "Warming up"
        with step(progress, f"{verb} {contender.name}, {contender.how}", 2) as update:
            contender.warm_up(token_ids, update)


def timed(contenders: Sequence[Contender], token_ids: Tensor, progress: Console) -> dict[str, Speed]:
    """``measure``, with a bar."""
    with step(progress, "Timing prefill and decode", ROUNDS) as update:
        return measure(contenders, token_ids, rounds=ROUNDS, steps=STEPS, on_round=update)
