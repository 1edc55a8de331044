"""``int8fx demo``: a model as loaded, Inductor in bf16, and llmint8 on both, in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from int8fx.analysis.metrics import (
    Accuracy,
    compare,
    sample_text,
    windows,
)
from int8fx.bench import smollm2, texts
from int8fx.bench.contenders import (
    ROUNDS,
    STEPS,
    Contender,
    Speed,
    line_up,
    timed,
    warm_up,
)
from int8fx.bench.progress import step
from int8fx.bench.timing import threads
from int8fx.errors import UserError
from int8fx.passes.linears.decision import in_schemes
from int8fx.torch_private import compile_counts

WINDOW = 512
SHORTEST_WINDOW = 16


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        model: a directory, a .gguf file or a hub name; None is SmolLM2-135M-Instruct.
        prompt: what the generated text answers or continues.
        new_tokens: how many tokens to generate, at most.
        windows: how many windows of the sample text to judge, at most.
        options: of llmint8.
    """

    model: str | None
    prompt: str
    new_tokens: int
    windows: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What the demo found: ``print`` it with rich, or take ``to_dict``.

    Attributes:
        title: the model's name.
        contenders, speeds, accuracies: the columns of the table, and what they scored, by name.
        windows, length: the accuracy's windows, and their tokens.
        recompiled: graphs that were compiled while timing, and made the speeds too low.
        prompt, answers: what each of the first and the last contender said to what, by name.
    """

    title: str
    contenders: Sequence[Contender]
    speeds: dict[str, Speed]
    accuracies: dict[str, Accuracy]
    windows: int
    length: int
    recompiled: int
    prompt: str
    answers: dict[str, str]

    def __rich__(self) -> RenderableType:
        return Group(
            results(self.title, self.contenders, self.speeds, self.accuracies),
            Text(_footer(self), style="dim"),
            Text(f"\n{self.prompt}", style="bold"),
            answers(self.answers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        columns = {
            contender.name: {
                "how": contender.how,
                "prefill_tokens_per_second": self.speeds[contender.name].prefill,
                "decode_tokens_per_second": self.speeds[contender.name].decode,
                "weight_bytes": contender.weight_bytes,
                "graph_breaks": contender.graph_breaks,
                **asdict(self.accuracies[contender.name]),
            }
            for contender in self.contenders
        }
        facts = ("windows", "length", "recompiled", "prompt", "answers")
        return {"model": self.title, "contenders": columns} | {key: getattr(self, key) for key in facts}


def run(settings: Settings, progress: Console) -> Outcome:
    """Runs the demo, with its bars on ``progress``.

    Raises:
        UserError: the model or the prompt cannot be used, and why.
    """
    model, tokenizer = texts.load(settings.model, progress)
    prompt = encode_prompt(tokenizer, settings.prompt)
    length = window_length(model, settings.new_tokens)
    capacity = length + max(settings.new_tokens, STEPS)
    if len(prompt) + settings.new_tokens > capacity:
        raise UserError(
            f"--prompt has {len(prompt)} tokens; at most {capacity - settings.new_tokens} fit "
            f"beside --tokens {settings.new_tokens}"
        )
    token_windows = _sample(tokenizer, length, settings.windows)

    with step(progress, "Preparing the models"):
        contenders = line_up(model, capacity, settings.options)
    warm_up(contenders, token_windows[:1], progress)
    before = compile_counts()
    speeds = timed(contenders, token_windows[:1], progress)
    recompiled = compile_counts()[0] - before[0]
    with step(progress, "Perplexity and agreement", len(token_windows)) as update:
        logits = {contender.name: contender.logits for contender in contenders}
        reference = logits[contenders[0].name]
        accuracies = compare(reference, logits, token_windows, update)
    said = {
        contender.name: _answer(contender, model, tokenizer, prompt, settings.new_tokens, progress)
        for contender in (contenders[0], contenders[-1])
    }

    return Outcome(
        title=settings.model or smollm2.CONVERTED,
        contenders=contenders,
        speeds=speeds,
        accuracies=accuracies,
        windows=token_windows.shape[0],
        length=token_windows.shape[1],
        recompiled=recompiled,
        prompt=settings.prompt,
        answers=said,
    )


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of the prompt, as a user's turn if the model is made for chats.

    Raises:
        UserError: there is nothing in it.
    """
    if not prompt.strip():
        raise UserError(f"--prompt {prompt!r} is empty; give at least one word")
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt)["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def window_length(model: Any, new_tokens: int) -> int:
    """How many tokens to prefill: a window, or what a model with a short context leaves of it."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW * 4
    length = min(WINDOW, context - max(new_tokens, STEPS))
    if length < SHORTEST_WINDOW:
        raise UserError(
            f"--tokens {new_tokens} is too many for this model's context of {context} tokens; "
            f"at most {context - SHORTEST_WINDOW} are allowed"
        )
    return length


def _sample(tokenizer: Any, length: int, count: int) -> Tensor:
    token_ids = torch.tensor(tokenizer(sample_text())["input_ids"])
    return windows(token_ids, length, min(count, token_ids.numel() // length))


def _answer(
    contender: Contender,
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    new_tokens: int,
    progress: Console,
) -> str:
    with step(progress, f"Generating with {contender.name}", len(prompt) + new_tokens) as update:
        token_ids = contender.generate(prompt, new_tokens, stop_tokens(model, tokenizer), update)
    return tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids after which a text is over, by the model's word and the tokenizer's."""
    stop = model.generation_config.eos_token_id
    listed = stop if isinstance(stop, list) else [stop]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def results(
    title: str,
    contenders: Sequence[Contender],
    speeds: dict[str, Speed],
    accuracies: dict[str, Accuracy],
) -> Table:
    """The table: a column for each contender."""
    table = Table(title=escape(title), title_style="bold", title_justify="left")
    table.add_column("")
    for contender in contenders:
        table.add_column(f"{contender.name}\n[dim]{contender.how}[/dim]", justify="right")

    def row(label: str, form: str, values: Sequence[float]) -> None:
        table.add_row(label, *(form.format(value) for value in values))

    speed = [speeds[contender.name] for contender in contenders]
    accuracy = [accuracies[contender.name] for contender in contenders]
    row("prefill, tokens/s", "{:,.0f}", [each.prefill for each in speed])
    row("decode, tokens/s", "{:,.1f}", [each.decode for each in speed])
    row("weights in use, MiB", "{:,.1f}", [each.weight_bytes / 2**20 for each in contenders])
    row("perplexity", "{:,.2f}", [each.perplexity for each in accuracy])
    row("top-1 agreement", "{:.1%}", [each.top1 for each in accuracy])
    row("mean KL, nats", "{:.4f}", [each.mean_kl for each in accuracy])
    row("graph breaks", "{:d}", [each.graph_breaks for each in contenders])
    return table


def answers(said: Mapping[str, str]) -> Table:
    """What the contenders said, side by side."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in said:
        table.add_column(name, style="none", ratio=1, overflow="fold")
    table.add_row(*map(Text, said.values()))
    return table


def _footer(outcome: Outcome) -> str:
    windows = "1 window" if outcome.windows == 1 else f"{outcome.windows} windows"
    lines = [
        f"Prefill of {outcome.length} tokens, then decode with a static KV cache; medians of {ROUNDS} "
        f"and {ROUNDS * STEPS}, {threads()}, Inductor in its default mode. "
        f"Accuracy on {windows} of {outcome.length} tokens, against the model as "
        "loaded.",
    ]
    lines += [
        f"{contender.name}: {len(contender.report.accepted)} of {len(contender.report.decisions)} "
        f"linears and matmuls {in_schemes(each.scheme for each in contender.report.accepted)}."
        for contender in outcome.contenders
        if contender.report is not None
    ]
    if outcome.recompiled:
        lines.append(f"{outcome.recompiled} graphs were compiled while timing: the speeds are too low.")
    return "\n".join(lines)
