"""``int8fx evaluate``: schemes side by side on one model and one text, the paper's Table 1 for it.

Each scheme runs as ``explain`` does: Dynamo's graph, rewritten, operator by operator. That needs no
compile, and its linears are the ones that a compiled model runs; ``compiled=True`` takes the compiled
model instead.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx

from int8fx import torch_private
from int8fx.analysis.metrics import (
    Accuracy,
    LogitsOf,
    compare,
    windows,
)
from int8fx.analysis.outlier_injection import inject_and_check
from int8fx.backend import llmint8
from int8fx.bench.progress import step
from int8fx.compiler.pipeline import rewrite_graph
from int8fx.errors import UserError
from int8fx.kernels.cpu.pages import trim_heap
from int8fx.options import Options
from int8fx.spec import scheme_and_settings
from int8fx.weights.store import WeightStore

FLOAT = "float, as loaded"


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        contenders: options of the backend, by the name that the table has for them.
        windows, length: how much of the text, and how many tokens are judged together.
        factor, seed: of the injected outliers; no factor, no injection.
        compiled: through Inductor.
        others: contenders that are no scheme of the model, as a copy of it in another dtype.
    """

    contenders: Mapping[str, Mapping[str, Any]]
    windows: int = 20
    length: int = 512
    factor: float | None = None
    seed: int = 0
    compiled: bool = False
    others: Mapping[str, LogitsOf] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What each contender scored; ``print`` it with rich, or take ``to_dict``.

    Attributes:
        title: model and text.
        accuracies: by contender, the float model first.
        injected: the same with injected outliers, or None; ``channels`` says in which.
    """

    title: str
    accuracies: dict[str, Accuracy]
    injected: dict[str, Accuracy] | None
    channels: tuple[int, ...]
    factor: float | None

    def __rich__(self) -> RenderableType:
        tables: list[RenderableType] = [table(self.title, self.accuracies)]
        if self.injected is not None:
            title = f"with {len(self.channels)} channels of every norm x{self.factor:g}"
            tables += ["", table(title, self.injected), Text(f"channels {list(self.channels)}")]
        return Group(*tables)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def table(title: str, accuracies: Mapping[str, Accuracy]) -> Table:
    """One line for each contender."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    shown.add_column("", overflow="fold")
    for column in ("perplexity", "mean KL", "p99 KL", "max KL", "top-1"):
        shown.add_column(column, justify="right")
    for name, each in accuracies.items():
        cells = (f"{each.perplexity:,.2f}", f"{each.mean_kl:.4f}", f"{each.p99_kl:.3f}")
        shown.add_row(name, *cells, f"{each.max_kl:.2f}", f"{each.top1:.1%}")
    return shown


def contender(spec: str) -> dict[str, Any]:
    """Options of the backend from ``scheme`` or ``scheme,setting=value,...``.

    Raises:
        UserError: names what was given and what is allowed.
    """
    name, settings = scheme_and_settings(spec, "--scheme")
    options = {"scheme": name, **settings}
    try:
        Options.parse(options)
    except ValueError as error:
        raise UserError(f"--scheme {spec}: {error}") from error
    return options


def logits_of(model: Callable[..., Any]) -> LogitsOf:
    """``token ids [1, n] -> logits [1, n, V]``, without a KV cache."""

    @torch.no_grad()
    def logits(token_ids: Tensor) -> Tensor:
        return model(input_ids=token_ids, use_cache=False).logits

    return logits


def quantized(model: Any, options: Mapping[str, Any], store: WeightStore, compiled: bool) -> LogitsOf:
    """The model's logits in a scheme; Dynamo traces it at the first call."""

    def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return rewrite_graph(gm, inputs, Options.parse(options), store)

    backend = functools.partial(llmint8, options=options) if compiled else run
    return logits_of(torch_private.compile_apart(model, backend))


def evaluate(
    model: Any, token_ids: Tensor, settings: Settings, title: str, progress: Console
) -> Evaluation:
    """Scores every contender against the float model.

    Args:
        model: a causal language model; with ``settings.factor``, its weights are changed in place.
        token_ids: ``[T]``, the text.

    Raises:
        UserError: the text is too short, or outliers cannot be injected.
    """
    try:
        token_windows = windows(token_ids, settings.length, settings.windows)
    except ValueError as error:
        raise UserError(str(error)) from error
    store, reference = WeightStore(), logits_of(model)
    contenders = {FLOAT: reference, **settings.others} | {
        name: quantized(model, options, store, settings.compiled)
        for name, options in settings.contenders.items()
    }
    with step(progress, "Compiling" if settings.compiled else "Tracing", len(contenders)) as update:
        for done, logits in enumerate(contenders.values(), start=1):
            logits(token_windows[:1])
            trim_heap()  # nine schemes would leave holes of several gigabytes
            update(done)
    accuracies = _judge("Windows", reference, contenders, token_windows, progress)
    injected, channels = None, []
    if settings.factor is not None:
        channels = inject_and_check(model, settings.factor, settings.seed, reference, token_windows[0])
        injected = _judge("Windows, with outliers", reference, contenders, token_windows, progress)
    judged = "1 window" if settings.windows == 1 else f"{settings.windows} windows"
    title += f", {judged} of {settings.length} tokens"
    return Evaluation(title, accuracies, injected, tuple(channels), settings.factor)


def _judge(
    what: str,
    reference: LogitsOf,
    contenders: Mapping[str, LogitsOf],
    token_windows: Tensor,
    progress: Console,
) -> dict[str, Accuracy]:
    with step(progress, what, len(token_windows)) as update:

        def on_window(done: int) -> None:
            trim_heap()
            update(done)

        return compare(reference, contenders, token_windows, on_window)
