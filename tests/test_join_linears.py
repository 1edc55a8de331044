"""join_linears: what becomes one call, what does not, and that the result is the same."""

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from int8fx.kernels import table
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.int8.join_linears import join_linears
from int8fx.testing.support import memory_of

M, K, LIMIT = 5, 8, 3


def joined_operator(x, threshold, decomposition, weights, w_scales, biases) -> list[Tensor]:
    """What a device's joined operator computes, by the operators that it takes the place of."""
    quantized = ops.quantize(x, threshold, decomposition)
    biases = biases or [None] * len(weights)
    return [
        ops.int8_linear(*quantized, *operands)
        for operands in zip(weights, w_scales, biases, strict=True)
    ]


class Example:
    """A graph with one quantisation and a linear for each entry of ``biases``.

    An entry is None, "placeholder", or "computed" for a bias that the graph makes in between.
    """

    def __init__(self, biases: list[str | None]) -> None:
        self.graph, self.mode, self.values = fx.Graph(), FakeTensorMode(), []
        generator = torch.Generator().manual_seed(0)
        x = self._placeholder("x", 9 * torch.randn(M, K, generator=generator))
        packed = [quantize_weight(torch.randn(4, K, generator=generator)) for _ in biases]
        weights = [self._placeholder(f"w{i}", table.pack(pair[0])) for i, pair in enumerate(packed)]
        scales = [self._placeholder(f"s{i}", pair[1]) for i, pair in enumerate(packed)]
        given = [
            kind and self._placeholder(f"b{i}", torch.randn(4, generator=generator))
            for i, kind in enumerate(biases)
        ]
        emit = Emitter(self.graph, self.mode, x)
        quantized = emit.call(ops.quantize, x, 6.0, "column")
        items = [emit.item(quantized, index) for index in range(4)]
        outputs = []
        for kind, weight, scale, bias in zip(biases, weights, scales, given, strict=True):
            bias = emit.call(torch.neg, bias) if kind == "computed" else bias
            outputs.append(emit.call(ops.int8_linear, *items, weight, scale, bias))
        self.graph.output(tuple(outputs))

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self.mode.from_tensor(value)
        self.values.append(value)
        return node

    def run(self) -> tuple[Tensor, ...]:
        self.graph.lint()
        return fx.GraphModule({}, self.graph)(*self.values)

    def count(self, target) -> int:
        return len(self.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("biases", "calls"),
    [
        ([None], 1),
        ([None, None, None], 1),
        ([None] * 4, 2),
        (["placeholder", "placeholder"], 1),
        ([None, "placeholder"], 2),
        (["computed", None], 1),
    ],
    ids=str,
)
def test_linears_of_one_activation_become_calls_of_at_most_three(biases, calls):
    example = Example(biases)
    before = example.run()
    memory = memory_of(example.graph, example.mode)
    made = join_linears(example.graph, example.mode, lambda device: (joined_operator, LIMIT), memory)
    assert made == calls == example.count(joined_operator)
    assert example.count(ops.quantize) == example.count(ops.int8_linear) == 0
    for y, expected in zip(example.run(), before, strict=True):
        torch.testing.assert_close(y, expected)


def test_a_device_without_such_an_operator_keeps_its_graph():
    example = Example([None, None])
    before = str(example.graph)
    asked = []
    memory = memory_of(example.graph, example.mode)
    assert join_linears(example.graph, example.mode, asked.append, memory) == 0
    assert asked == ["cpu"]
    assert str(example.graph) == before
