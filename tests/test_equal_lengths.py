"""passes/graph/equal_lengths.py: the caches of a decoder's layers have one length."""

import copy

import pytest
import torch
from torch import nn

import int8fx
from int8fx.passes.graph.equal_lengths import FEW
from int8fx.torch_private import compile_counts

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.11"),
    reason="Dynamo of torch 2.11 compiles each length of tensors in a list",
)

K = 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.up, self.down = nn.Linear(K, K), nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x, keys, values):
        y = torch.nn.functional.rms_norm(x, (K,))
        y = x + (self.query(y) @ keys.transpose(-1, -2)).softmax(-1) @ values
        return y + self.down(torch.tanh(self.up(y)) * torch.sigmoid(y).repeat(1, 1, 2))


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.requires_grad_(False)

    def forward(self, x, caches):
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            x = layer(x, keys, values)
        return x


def caches_of(*lengths, dtype=torch.float32):
    return [tuple(torch.randn(1, length, K, dtype=dtype) for _ in range(2)) for length in lengths]


def changed(reports, name):
    return [each.changed for report in reports for each in report.passes if each.name == name]


def refused(reports):
    return [
        each.refused for report in reports for each in report.passes if each.name == "equal_lengths"
    ]


def compile_for(model, *calls):
    """The compiled model and its reports, once it has run with these arguments behind x."""
    torch._dynamo.reset()
    with int8fx.collect_reports() as reports, torch.no_grad():
        forward = torch.compile(model, backend="llmint8", fullgraph=True)
        for argument in calls:
            forward(torch.randn(1, 1, K), argument)
    return model, forward, reports


@pytest.fixture
def compiled():
    """A decoder of four layers, compiled for caches whose lengths vary, and what it was compiled to."""
    return compile_for(Decoder(4), caches_of(*[5] * 4), caches_of(*[6] * 4))


def check(model, forward, caches):
    x = torch.randn(1, 1, K)
    quantized = int8fx.quantize_(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(forward(x, caches), quantized(x, caches), rtol=1e-4, atol=1e-4)


def test_layers_are_equal_where_their_lengths_are(compiled):
    _, _, reports = compiled
    # The second graph is of lengths that vary, one of each layer.
    assert changed(reports, "equal_lengths") == [0, 3]
    assert all(count >= 4 for count in changed(reports, "outline"))


def test_other_lengths_are_the_same_graph(compiled):
    model, forward, _ = compiled
    graphs = compile_counts()[0]
    for length in (7, 30, 8):
        check(model, forward, caches_of(*[length] * 4))
    assert compile_counts()[0] == graphs


def test_lengths_that_differ_later_are_compiled_again_and_right(compiled):
    model, forward, _ = compiled
    graphs = compile_counts()[0]
    check(model, forward, caches_of(9, 9, 4, 9))
    check(model, forward, caches_of(3, 8, 3, 8))
    assert compile_counts()[0] > graphs


def test_each_length_has_its_layers():
    """Some models look back less far in every second layer."""
    lengths = ([5, 9] * 3, [6, 10] * 3)
    model, forward, reports = compile_for(Decoder(6), *(caches_of(*each) for each in lengths))
    assert changed(reports, "equal_lengths")[-1] == 4
    check(model, forward, caches_of(*[7, 11] * 3))


def test_few_inputs_may_be_of_equal_length_by_chance():
    model, forward, reports = compile_for(Decoder(2), caches_of(5, 5), caches_of(6, 6))
    assert changed(reports, "equal_lengths")[-1] == 0
    assert refused(reports)[-1] == {FEW: 1}
    graphs = compile_counts()[0]
    check(model, forward, caches_of(4, 7))
    assert compile_counts()[0] == graphs


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(K, K).requires_grad_(False)

    def forward(self, x, many):
        return self.linear(x + sum(each.sum((0, 1)) for each in many))


def test_what_differs_in_more_than_its_length_is_not_alike():
    inputs = ([torch.randn(1 + count, length, K) for count in range(6)] for length in (5, 6))
    *_, reports = compile_for(Sums(), *inputs)
    assert changed(reports, "equal_lengths")[-1] == 0
    assert refused(reports)[-1] == {}
