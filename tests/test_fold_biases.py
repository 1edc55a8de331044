"""fold_biases: which vectors move into the int8 linear, and why others stay."""

import operator
from collections import Counter

import pytest
import torch
from torch import fx, nn

from int8fx.compiler.effects import Effects
from int8fx.kernels.ops import int8_linear as ops
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.scope import Scope
from int8fx.passes.int8.fold_biases import (
    COMPUTED,
    MISFIT,
    READ_ELSEWHERE,
    READ_WITHOUT,
    SCALED,
    WRITTEN,
    fold_biases,
)
from int8fx.testing.support import assert_close_to_float64, compile_once, context_of, outcome_of

K, N = 16, 24


@pytest.fixture
def x():
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1))


class Biased(nn.Module):
    def __init__(self, combine, bias_shape=(N,)):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(K, N), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(bias_shape), requires_grad=False)
        self.combine = combine

    def forward(self, x):
        return self.combine(x @ self.weight, self.bias)


def adds(report) -> int:
    printed = "\n".join(line for line in report.graph.splitlines() if "# File:" not in line)
    return printed.count(" + ") + printed.count("torch.add(")


def refused(report) -> dict[str, int]:
    return outcome_of(report, "fold_biases").refused


def test_a_bias_after_a_matmul_moves_into_the_linear(x):
    model = Biased(lambda y, b: y + b)
    y, report = compile_once(model, x)
    assert adds(report) == 0
    assert_close_to_float64(y, x.double() @ model.weight.double() + model.bias.double(), K)


def add_after_a_write(y, bias):
    bias.mul_(2)
    return y + bias


@pytest.mark.parametrize(
    ("combine", "shape", "reason"),
    [
        (lambda y, b: y + b, (3, N), None),
        (lambda y, b: y + b, (1,), MISFIT),
        (lambda y, b: torch.add(y, b, alpha=2), (N,), SCALED),
        (lambda y, b: (y + b) * y, (N,), READ_WITHOUT),
        (lambda y, b: y + b * b, (N,), COMPUTED),
        (lambda y, b: (y + b) * b, (N,), READ_ELSEWHERE),
        (add_after_a_write, (N,), READ_ELSEWHERE),
    ],
    ids=["residual", "broadcast", "alpha", "two readers", "computed", "bias read twice", "written"],
)
def test_what_is_no_bias_stays_where_it_is_for_a_reason(x, combine, shape, reason):
    model = Biased(combine, shape)
    bias = model.bias.double()
    y, report = compile_once(model, x)
    assert adds(report) == 1
    assert refused(report) == ({reason: 1} if reason else {})
    assert_close_to_float64(y, combine(x.double() @ model.weight.double(), bias), K)


def graph_of() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """``int8_linear(...) + bias``"""
    graph = fx.Graph()
    bias = graph.placeholder("bias")
    bias.meta["example_value"] = torch.empty(N)
    linear = graph.call_function(ops.int8_linear, (None,) * 7)
    linear.meta["example_value"] = torch.empty(3, N)
    graph.output(graph.call_function(operator.add, (linear, bias)))
    return graph, linear, bias


def test_a_bias_is_counted_and_folded_once():
    graph, linear, bias = graph_of()
    assert fold_biases(graph, context_of(graph)) == Result(1)
    assert linear.args[6] is bias
    assert not graph.find_nodes(op="call_function", target=operator.add)
    assert fold_biases(graph, context_of(graph)) == Result(0)


def test_a_linear_called_by_names_is_read_by_names():
    graph, linear, bias = graph_of()
    linear.args, linear.kwargs = (None,) * 4, {"bias": None, "w_scale": None, "weight": None}
    assert fold_biases(graph, context_of(graph)) == Result(1)
    assert linear.args[6] is bias


def test_a_bias_that_a_view_of_it_is_written_through_stays():
    graph = fx.Graph()
    whole = graph.placeholder("whole")
    bias = graph.placeholder("bias")
    memory = torch.empty(N)
    whole.meta["example_value"] = bias.meta["example_value"] = memory
    linear = graph.call_function(ops.int8_linear, (None,) * 7)
    linear.meta["example_value"] = torch.empty(3, N)
    written = graph.call_method("zero_", (whole,))
    written.meta["example_value"] = memory
    graph.output(graph.call_function(operator.add, (linear, bias)))
    scope = Scope(fx.GraphModule({}, graph))
    context = Context(None, lambda: Memory(scope, Effects(None), [(whole, bias)]))
    assert fold_biases(graph, context) == Result(0, Counter({WRITTEN: 1}))
