"""Stacks of one linear, the contenders that run it, and the measurement."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from int8fx import torch_private
from int8fx.bench.timing import Timing, interleaved

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
