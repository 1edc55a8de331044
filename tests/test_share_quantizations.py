"""share_quantizations: which quantisations become one, and why others stay."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.schemes.affine import quantize_affine
from int8fx.passes.contract import Result
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.int8.share_quantizations import OTHER_SETTINGS, WRITTEN, share_quantizations
from int8fx.testing.support import assert_close_to_float64, compile_once, context_of, outcome_of

QUANTIZERS = frozenset({ops.quantize, quantize_affine})
COLUMN, TOKEN = (ops.quantize, 6.0, "column"), (ops.quantize, 6.0, "token")
AFFINE = (quantize_affine, 0.0, "token", False, True)
M, K = 3, 16


def graph_of(*quantizations: tuple | str) -> tuple[fx.Graph, FakeTensorMode]:
    """A graph that quantises x, writes to x, or reads another input in turn."""
    graph, mode = fx.Graph(), FakeTensorMode()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    for node in (x, other):
        node.meta["example_value"] = mode.from_tensor(torch.empty(M, K))
    emit, read = Emitter(graph, mode, x), []
    for each in quantizations:
        if each == "write":
            emit.method("mul_", x, 2.0)
        else:
            quantizer, *settings = each
            node = other if settings[-1:] == ["other"] else x
            quantized = emit.call(quantizer, node, *[each for each in settings if each != "other"])
            read += [emit.item(quantized, 0), emit.item(quantized, 1)]
    graph.output(tuple(read))
    return graph, mode


@pytest.mark.parametrize(
    ("quantizations", "saved", "refused", "left"),
    [
        ([COLUMN], 0, {}, 1),
        ([COLUMN, COLUMN, COLUMN], 2, {}, 1),
        ([COLUMN, TOKEN], 0, {OTHER_SETTINGS: 1}, 2),
        ([COLUMN, AFFINE, COLUMN, AFFINE], 2, {OTHER_SETTINGS: 1}, 2),
        ([COLUMN, (*COLUMN, "other")], 0, {}, 2),
        ([COLUMN, "write", COLUMN], 0, {WRITTEN: 1}, 2),
        ([COLUMN, "write", COLUMN, COLUMN], 1, {WRITTEN: 1}, 2),
    ],
    ids=["one", "three", "settings", "two of two", "two inputs", "a write between", "after a write"],
)
def test_equal_quantisations_of_one_input_become_one(quantizations, saved, refused, left):
    graph, mode = graph_of(*quantizations)
    inputs = [torch.randn(M, K, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    before = fx.GraphModule({}, graph)(*(each.clone() for each in inputs))
    context = context_of(graph, mode, quantizers=QUANTIZERS)
    assert share_quantizations(graph, context) == Result(saved, Counter(refused))
    graph.lint()
    assert context.quantizations == left
    assert sum(node.target in QUANTIZERS for node in graph.nodes) == left
    after = fx.GraphModule({}, graph)(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_an_operator_that_is_no_quantiser_is_not_shared():
    graph, mode = graph_of(COLUMN, COLUMN)
    assert share_quantizations(graph, context_of(graph, mode)) == Result(0)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * self.v(x)


@pytest.fixture
def x():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x):
        x = x.clone()
        y = self.a(x)
        x.add_(y)
        return y + self.b(x)


def check(y: Tensor, model: nn.Module, x: Tensor) -> None:
    assert_close_to_float64(y, copy.deepcopy(model).double()(x.double()), K)


def test_an_input_written_between_two_linears_is_quantised_twice(x):
    model = Residual().requires_grad_(False)
    y, report = compile_once(model, x)
    assert report.quantizations == 2
    assert outcome_of(report, "share_quantizations").refused == {WRITTEN: 1}
    check(y, model, x)


def test_linears_of_one_input_share_its_quantisation(x):
    model = Three().requires_grad_(False)
    y, report = compile_once(model, x)
    assert report.quantizations == 1
    outcome = outcome_of(report, "share_quantizations")
    assert (outcome.changed, outcome.refused) == (2, {})
    assert "  pass share_quantizations: 2 changed" in str(report).splitlines()
    check(y, model, x)


def test_the_report_says_why_one_input_is_quantised_twice(x):
    rules = [("k", "absmax-vector")]
    _, report = compile_once(Three().requires_grad_(False), x, backend_options={"rules": rules})
    assert report.quantizations == 2
    line = f"  pass share_quantizations: 1 changed; left 1 x {OTHER_SETTINGS}"
    assert line in str(report).splitlines()
