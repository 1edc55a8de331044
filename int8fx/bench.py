"""``int8fx bench``: linears of several sizes, and one model, under Inductor in bf16 and under llmint8.

One linear is measured as a stack of them in one graph: with few rows as many as leave the cache, so
that the weights come from memory, as in a model.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from int8fx import torch_private
from int8fx.contenders import STEPS, Speed, line_up, timed, warm_up
from int8fx.progress import step
from int8fx.timing import Timing, interleaved, machine

COLD_BYTES = 128 << 20  # of int8 weights: more than a last-level cache holds
MOST_LINEARS = 200  # in one graph
COLD_ROWS = 16  # up to so many, reading the weights is most of the time
HIDDEN_OPERATIONS = 2e9  # in one call: some milliseconds, beside which its overhead is nothing
OUTLIER_SIZE = 20.0
OUTLIERS = "6"
BASELINE = "Inductor bf16"


class Missing(Exception):
    """A contender that is not installed."""


class Stack(nn.Module):
    """Several linears of one shape, each with an input of its own.

    One call reads more weights than the cache holds, and all of them are in one graph, as a model's
    are; no contender can join linears that read different inputs.
    """

    def __init__(self, K: int, N: int, count: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(count))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [linear(x) for linear, x in zip(self.linears, xs, strict=True)]


def linears_in_stack(M: int, K: int, N: int) -> int:
    if M <= COLD_ROWS:
        return min(math.ceil(COLD_BYTES / (K * N)), MOST_LINEARS)
    return math.ceil(HIDDEN_OPERATIONS / (2 * M * K * N))


Run = Callable[[list[Tensor]], list[Tensor]]
Build = Callable[[nn.Module], Run]


def compiled(backend: str, **options: Any) -> Build:
    return lambda model: torch.compile(model, backend=backend, dynamic=False, **options)


def llmint8(**options: Any) -> Build:
    return compiled("llmint8", options={"skip": [], **options})


def activations(M: int, K: int, outliers: str) -> Tensor:
    """bf16 rows with some columns of outliers: a count, or a share of K as ``2%``."""
    count = round(K * float(outliers[:-1]) / 100) if outliers.endswith("%") else int(outliers)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).clamp(-5, 5)
    columns = torch.randperm(K, generator=generator)[:count]
    x[:, columns] = OUTLIER_SIZE * (1 + x[:, columns].abs())
    return x.to(torch.bfloat16)


@torch.no_grad()
def measure(
    M: int, K: int, N: int, outliers: str, builds: Mapping[str, Build], seconds: float
) -> tuple[dict[str, Timing], list[str]]:
    """The timings of one linear by contender, and the contenders that are missing."""
    torch.compiler.reset()
    count = linears_in_stack(M, K, N)
    x = activations(M, K, outliers)
    xs = [x.clone() for _ in range(count)]
    torch.manual_seed(0)
    stack = Stack(K, N, count).to(torch.bfloat16).requires_grad_(False).eval()
    calls: dict[str, list[Callable[[], object]]] = {}
    missing = []
    for name, build in builds.items():
        try:
            calls[name] = [functools.partial(build(copy.deepcopy(stack)), xs)]
        except Missing as contender:
            missing.append(str(contender))
    # Every contender compiles the same forward.
    with torch_private.recompile_limit(2 * len(builds)):
        timings = interleaved(calls, seconds=seconds)
    return {name: timing / count for name, timing in timings.items()}, missing


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        K, N: of the linear.
        rows: values of M.
        schemes: of llmint8.
        seconds: of measuring, for each contender and M.
        tokens: of the model's prefill.
    """

    K: int
    N: int
    rows: Sequence[int]
    schemes: Sequence[str]
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Benchmark:
    """The figures; ``print`` them with rich, or take ``to_dict``.

    Attributes:
        machine: what they were read on.
        K, N, linears: by M and contender, seconds of one linear.
        title, how, speeds: of the model, by contender.
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
            self._model_table(),
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


def bench(
    model: Any, token_ids: Tensor, title: str, settings: Settings, progress: Console
) -> Benchmark:
    """Times linears, and a model's prefill and decode.

    Args:
        token_ids: ``[1, n]`` with ``settings.tokens`` of them at least.
    """
    builds = {BASELINE: compiled("inductor")} | {
        f"llmint8 {scheme}": llmint8(scheme=scheme) for scheme in settings.schemes
    }
    linears = {}
    with step(progress, f"Linears of {settings.K}x{settings.N}", len(settings.rows)) as update:
        for done, M in enumerate(settings.rows, start=1):
            linears[M], _ = measure(M, settings.K, settings.N, OUTLIERS, builds, settings.seconds)
            update(done)
    torch.compiler.reset()
    window = token_ids[:, : settings.tokens]
    contenders = line_up(model, window.shape[1] + STEPS)
    warm_up(contenders, window, progress)
    speeds = timed(contenders, window, progress)
    how = {contender.name: contender.how for contender in contenders}
    title = f"{title}, {window.shape[1]} tokens"
    return Benchmark(machine(), settings.K, settings.N, linears, title, how, speeds)
