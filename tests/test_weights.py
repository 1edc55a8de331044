"""Weights are inputs: shared graphs, changes after the compile, one quantisation each."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from int8fx.kernels.formats.int8 import PER_CHANNEL, PER_TENSOR
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.testing.support import assert_close_to_float64, compile_once
from int8fx.weights.store import STORE, WeightStore

K, N = 32, 48


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(K, N).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def check(compiled, model, x):
    y = compiled(x)
    assert_close_to_float64(y, copy.deepcopy(model).double()(x.double()), K)


def change_in_place(linear):
    linear.weight.mul_(-3)


def change_data(linear):
    linear.weight.data = torch.randn(N, K)


def change_data_there_and_back(linear):
    # The freed address may be handed out again: same address, same version, other values.
    linear.weight.data = (linear.weight.data * -2).half()
    linear.weight.data = linear.weight.data.float()


def load_state_dict(linear):
    linear.load_state_dict(nn.Linear(K, N).state_dict())


def replace_parameter(linear):
    linear.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_data, change_data_there_and_back, load_state_dict, replace_parameter],
    ids=lambda change: change.__name__,
)
def test_a_changed_weight_is_seen_at_the_next_call(linear, x, change):
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="llmint8")
    check(compiled, linear, x)
    change(linear)
    check(compiled, linear, x)
    check(compiled, linear, x)


def test_a_changed_weight_is_quantised_again_without_a_recompile(linear, x):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("llmint8")
    compiled = torch.compile(linear, backend=counter)
    check(compiled, linear, x)
    for change in (change_in_place, change_data, load_state_dict):
        change(linear)
        check(compiled, linear, x)
    assert counter.frame_count == 1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_regional_compilation_shares_one_graph_and_not_the_weights(x):
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(4))).requires_grad_(False)
    expected = copy.deepcopy(blocks).double()(x.double())
    counter = CompileCounterWithBackend("llmint8")
    for block in blocks:
        block.compile(backend=counter)
    for _ in range(2):
        assert_close_to_float64(blocks(x), expected, K)
    assert counter.frame_count == 1


def test_each_weight_is_quantised_once_for_all_graphs(linear, x):
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(linear, backend="llmint8", dynamic=dynamic)
        for rows in (1, 5, 9):
            compiled(x[:1].expand(rows, -1))
    assert len(STORE.forms(linear.weight)) == 1


def test_a_tied_weight_is_quantised_once_and_each_of_its_forms_is_right(x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(K, N, bias=False)
            self.again = nn.Linear(K, N, bias=False)
            self.again.weight = self.up.weight

        def forward(self, x):
            return (self.up(x) + self.again(2 * x)) @ self.up.weight

    torch.manual_seed(0)
    model = Tied().requires_grad_(False)
    y, report = compile_once(model, x)
    assert len(report.accepted) == 3
    # [N, K] for two linears, and its transpose for the matmul
    assert len(STORE.forms(model.up.weight)) == 2
    assert_close_to_float64(y, copy.deepcopy(model).double()(x.double()), K)


def test_a_head_tied_to_the_embedding_stays_in_float():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, K)
            self.body, self.out = nn.Linear(K, K), nn.Linear(K, 100, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, tokens):
            return self.out(self.body(self.embedding(tokens)))

    tokens = torch.arange(6)
    _, report = compile_once(Model(), tokens)
    assert [decision.accepted for decision in report.decisions] == [True, False]
    assert "output head" in report.decisions[1].reason
    _, report = compile_once(Model(), tokens, backend_options={"skip": []})
    assert [decision.accepted for decision in report.decisions] == [True, True]
    # By the name that the user gave it, whatever Dynamo calls the weight.
    assert [decision.path for decision in report.decisions] == ["body", "out"]
    _, report = compile_once(Model(), tokens, backend_options={"skip": ["out"]})
    assert report.decisions[1].reason == "skip: matches 'out'" and report.unused == ()
    rules = [("out", "w8a16")]
    _, report = compile_once(Model(), tokens, backend_options={"skip": [], "rules": rules})
    assert [decision.scheme for decision in report.decisions] == ["llm.int8", "w8a16"]


def test_packed_weights_go_with_their_model(x):
    torch._dynamo.reset()
    model = nn.Linear(K, N).requires_grad_(False)
    compiled = torch.compile(model, backend="llmint8")
    compiled(x)
    (packed,) = STORE.forms(model.weight)
    freed = weakref.ref(packed)
    del model, compiled, packed
    torch._dynamo.reset()
    gc.collect()
    assert freed() is None


def test_store_sees_a_storage_that_was_replaced(linear):
    store = WeightStore()
    expression = WeightExpression(None, ())
    first = store.get(linear.weight, expression, PER_CHANNEL)
    assert store.get(linear.weight, expression, PER_CHANNEL) is first
    assert store.get(linear.weight, expression, PER_TENSOR) is not first
    linear.weight.data = linear.weight.data.clone()
    assert store.get(linear.weight, expression, PER_CHANNEL) is not first


def test_the_graph_that_writes_to_a_weight_keeps_it_in_float(x):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)

        def forward(self, x):
            self.weight.mul_(0.5)
            return nn.functional.linear(x, self.weight)

    model = Writes()
    expected = nn.functional.linear(x, model.weight * 0.5)
    y, report = compile_once(model, x)
    assert report.decisions[0].reason == "the graph writes to this weight"
    torch.testing.assert_close(y, expected)


def test_writing_to_a_result_is_not_writing_to_the_weight(x):
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)

        def forward(self, x):
            return (self.weight @ x.t()).mul_(2)

    model = Scales()
    y, report = compile_once(model, x)
    assert report.decisions[0].accepted
    assert_close_to_float64(y, 2 * model.weight.double() @ x.double().t(), K)


def test_a_buffer_serves_as_a_weight(x):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(K, N))

        def forward(self, x):
            return x @ self.weight

    model = Buffered()
    y, report = compile_once(model, x, backend_options={"only": ["weight"]})
    assert report.decisions[0].accepted
    assert_close_to_float64(y, x.double() @ model.weight.double(), K)
