"""A compile asks for the kernels of its own devices, and of no other: asking may be building."""

import dataclasses

import torch

import int8fx
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.context import context_of
from int8fx.compiler.pipeline import rewrite_graph
from int8fx.kernels import table
from int8fx.options import Options
from int8fx.passes import order
from int8fx.testing.support import compile_once
from int8fx.weights.store import WeightStore


def never() -> str | None:
    raise AssertionError("a kernel of a device that the graph is not on was asked for")


class Attending(torch.nn.Module):
    """Linears, and an attention, for which some devices have a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).view(*x.shape[:-1], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def elsewhere(monkeypatch) -> None:
    """One more device in the table, of whose kernel there is everything, and which cannot be loaded."""
    kernel = table.Kernel(
        "elsewhere",
        never,
        table.as_it_is,
        table.same_shape,
        table.still_as_it_is,
        attends=lambda few: bool(never()),
        whole_rows=False,
    )
    monkeypatch.setitem(table.KERNELS, table.key_of("elsewhere"), kernel)


def test_a_compile_asks_for_no_kernel_of_another_device(monkeypatch):
    elsewhere(monkeypatch)
    _, report = compile_once(Attending().requires_grad_(False), torch.randn(1, 40, 32))
    assert list(report.kernel) == ["cpu"]
    assert len(report.accepted) == 1


def test_a_graph_without_a_cpu_builds_nothing_for_one(monkeypatch):
    """As one of a GPU alone; that of no device at all needs none to run."""
    cpu = dataclasses.replace(table.KERNELS[table.key_of("cpu")], load=never)
    monkeypatch.setitem(table.KERNELS, table.key_of("cpu"), cpu)
    table.kernel_for.cache_clear()
    store, seen = WeightStore(), []

    def watch(compilation: Compilation) -> None:
        context = context_of(compilation, for_inductor=True)
        for each in order.PASSES:
            each.run(compilation.root, context)
        seen.append((table.describe(compilation.devices), compilation.decisions))

    def backend(gm: torch.fx.GraphModule, inputs: list):
        return rewrite_graph(gm, inputs, Options(), store, watch)

    try:
        with torch.no_grad():
            torch.compile(Attending().to("meta"), backend=backend)(
                torch.empty(1, 40, 32, device="meta")
            )
    finally:
        table.kernel_for.cache_clear()
    ((kernel, decisions),) = seen
    assert kernel == {}
    assert [each.reason for each in decisions] == ["no int8 kernel for device 'meta'"]


def test_neither_does_explain(monkeypatch):
    elsewhere(monkeypatch)
    explained = int8fx.explain(Attending(), torch.randn(1, 40, 32))
    assert list(explained.kernel) == ["cpu"]


def test_what_is_described_is_what_was_asked_for(monkeypatch):
    elsewhere(monkeypatch)
    assert list(table.describe({"cpu", "meta"})) == ["cpu"]
    assert table.describe(()) == {}
