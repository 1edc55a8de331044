"""``int8fx bench``: linears of several sizes, and one model, under Inductor in bf16 and under llmint8.

One linear is measured as a stack of them in one graph: with few rows as many as leave the cache, so
that the weights come from memory, as in a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from int8fx.bench.contenders import (
    STEPS,
    Speed,
    line_up,
    timed,
    warm_up,
)
from int8fx.bench.linears import BASELINE, OUTLIERS, compiled, llmint8, measure
from int8fx.bench.progress import step
from int8fx.bench.timing import Timing, machine


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        K, N: of the linear.
        rows: values of M.
        contenders: options of llmint8, by the name that the tables have for them; the model runs with
            the first.
        seconds: of measuring, for each contender and M.
        tokens: of the model's prefill.
    """

    K: int
    N: int
    rows: Sequence[int]
    contenders: Mapping[str, Mapping[str, Any]]
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Benchmark:
    """The figures; ``print`` them with rich, or take ``to_dict``.

    Attributes:
        machine: what they were read on.
        K, N, linears: by M and contender, seconds of one linear.
        title, how, speeds: of the model, by contender; empty without one.
    """

    machine: str
    K: int
    N: int
    linears: dict[int, dict[str, Timing]]
    title: str
    how: dict[str, str]
    speeds: dict[str, Speed]

    def __rich__(self) -> RenderableType:
        return Group(
            Text(self.machine, style="dim"),
            self._linear_table(),
            Text(f"speed over {BASELINE} in the same run, then GOP/s; {OUTLIERS} outlier columns"),
            *([self._model_table()] if self.speeds else []),
        )

    def _linear_table(self) -> Table:
        table = Table(title=f"One linear, K={self.K}, N={self.N}, bf16 x, cold w", title_justify="left")
        table.add_column("")
        for M in self.linears:
            table.add_column(f"M={M}", justify="right")
        for name in next(iter(self.linears.values())):
            cells = []
            for M, timings in self.linears.items():
                seconds = timings[name].median
                ratio = timings[BASELINE].median / seconds
                cells.append(f"{ratio:.2f}x {2e-9 * M * self.K * self.N / seconds:.0f}")
            table.add_row(name, *cells)
        return table

    def _model_table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        table.add_column("tokens/s")
        for column in ("prefill", "decode"):
            table.add_column(column, justify="right")
        for name, speed in self.speeds.items():
            table.add_row(f"{name}, {self.how[name]}", f"{speed.prefill:,.0f}", f"{speed.decode:,.1f}")
        return table

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Options that are about modules of the model, and mean nothing to a single linear.
OF_MODULES = ("rules", "skip", "only", "calibration")


def bench(
    settings: Settings,
    progress: Console,
    model: Any = None,
    token_ids: Tensor | None = None,
    title: str = "",
) -> Benchmark:
    """Times linears, and a model's prefill and decode.

    Args:
        model: None: linears alone.
        token_ids: ``[1, n]`` with ``settings.tokens`` of them at least.
        title: the model's name.
    """
    linears = _linears(settings, progress)
    shown = machine(), settings.K, settings.N, linears
    if model is None or token_ids is None:
        return Benchmark(*shown, "", {}, {})
    torch.compiler.reset()
    window = token_ids[:, : settings.tokens]
    name, options = next(iter(settings.contenders.items()))
    contenders = line_up(model, window.shape[1] + STEPS, options)
    warm_up(contenders, window, progress)
    speeds = timed(contenders, window, progress)
    how = {contender.name: contender.how for contender in contenders}
    return Benchmark(*shown, f"{title}, {window.shape[1]} tokens, llmint8: {name}", how, speeds)


def _linears(settings: Settings, progress: Console) -> dict[int, dict[str, Timing]]:
    """By M and contender."""
    builds = {BASELINE: compiled("inductor")} | {
        f"llmint8 {name}": llmint8(**{k: v for k, v in options.items() if k not in OF_MODULES})
        for name, options in settings.contenders.items()
    }
    linears = {}
    with step(progress, f"Linears of {settings.K}x{settings.N}", len(settings.rows)) as update:
        for done, M in enumerate(settings.rows, start=1):
            linears[M], _ = measure(M, settings.K, settings.N, OUTLIERS, builds, settings.seconds)
            update(done)
    return linears
