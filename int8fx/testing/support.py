"""What several tests share: compiling once, and bounds that follow from the scheme."""

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import int8fx
from int8fx import torch_private
from int8fx.compiler.effects import Effects
from int8fx.passes.contract import Context
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.scope import Scope
from int8fx.passes.outcome import Outcome


def check_adapter_gradients(model: nn.Module, x: Tensor, compiled: bool, bound: float) -> None:
    """Two adapters' gradients beside those of the de-quantised model in float64."""
    reference = copy.deepcopy(model)
    int8fx.dequantize_(reference).double()
    call: Callable[..., Any] = model
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, backend="llmint8", fullgraph=True)
    call(x).pow(2).sum().backward()
    reference(x.double()).pow(2).sum().backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if "lora" in n}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 4
    for name, gradient in found.items():
        right = expected[name]
        assert right is not None
        error = (gradient.double() - right).norm() / right.norm()
        assert error < bound, f"{name}: {error:.4f}"


def compile_once(
    model: nn.Module, *args: Tensor, backend_options: dict | None = None, **compile_options
) -> tuple[Tensor, int8fx.Report]:
    """The output of a freshly compiled model, and the one report of its compile."""
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="llmint8", fullgraph=True, options=backend_options, **compile_options
    )
    with torch.no_grad(), int8fx.collect_reports() as reports:
        y = compiled(*args)
    (report,) = reports
    return y, report


def interpreted(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """A compiled model whose rewritten graph runs operator by operator, under no_grad.

    Inductor would be all the time that the tests take.
    """

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with mock.patch.object(torch_private, "compile_with_inductor", lambda gm, *rest: gm):
            return int8fx.llmint8(gm, inputs, options=options)

    return torch.no_grad()(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))


def reports_of(call: Callable[[], Any]) -> list[int8fx.Report]:
    """The reports of what a call compiles, from the beginning."""
    torch._dynamo.reset()
    with int8fx.collect_reports() as reports:
        call()
    return reports


def outcome_of(report: int8fx.Report, name: str) -> Outcome:
    """What came of a pass."""
    (outcome,) = [each for each in report.passes if each.name == name]
    return outcome


def assert_close_to_float64(y: Tensor, expected: Tensor, K: int) -> None:
    """A loose check of agreement, for tests of the rewriting; bounds.py has the derived one.

    The round-off of x and of w is at most half a step of absmax / 127 each, so an error of one output
    is some sqrt(K) / 127 of its terms; a wrong rewrite is an error of the size of the output.
    """
    error = (y.double() - expected).norm() / expected.norm()
    assert y.isfinite().all()
    assert error < 0.02, f"relative error {error:.4f}"


def memory_of(graph: fx.Graph, fake_mode: Any = None) -> Memory:
    """What a pass asks about the writes of one graph without sub-graphs."""
    return Memory(Scope(types.SimpleNamespace(graph=graph)), Effects(fake_mode))  # type: ignore[arg-type]


def context_of(graph: fx.Graph, fake_mode: Any = None, **given: Any) -> Context:
    """What a pass is given for one graph without sub-graphs; ``given`` are fields of the context."""
    return Context(fake_mode, lambda: memory_of(graph, fake_mode), **given)


class Mlp(nn.Module):
    """Two linears, one with a bias, with a ReLU between them: ``[*, K] -> [*, K]``."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))
