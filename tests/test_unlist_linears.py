"""unlist_linears: which calls return a tensor and no list, for Inductor's wrapper in C++."""

from collections import Counter

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from int8fx.kernels import table
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.passes import order
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.int8.unlist_linears import SEVERAL, unlist_linears
from int8fx.testing.support import context_of

M, K, N = 5, 32, 16


def graph_of(linears: int, bias: bool) -> tuple[fx.Graph, FakeTensorMode, list[Tensor]]:
    """One call of ``int8_linears``, and the inputs of its graph."""
    generator = torch.Generator().manual_seed(0)
    packed = [quantize_weight(torch.randn(N, K, generator=generator)) for _ in range(linears)]
    values = [torch.randn(M, K, generator=generator)]
    values += [table.pack(weight) for weight, _ in packed] + [scale for _, scale in packed]
    values += [torch.randn(N, generator=generator) for _ in range(linears if bias else 0)]
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = [graph.placeholder(f"input_{index}") for index in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["example_value"] = mode.from_tensor(value)
    x, *rest = nodes
    weights, w_scales, biases = (
        rest[:linears],
        rest[linears : 2 * linears],
        rest[2 * linears :],
    )
    emit = Emitter(graph, mode, x)
    call = emit.call(ops.int8_linears, x, 6.0, "token", weights, w_scales, biases)
    graph.output(tuple(emit.item(call, index) for index in range(linears)))
    return graph, mode, values


@pytest.mark.parametrize("bias", [True, False])
def test_a_call_of_one_linear_returns_its_tensor(bias):
    graph, mode, values = graph_of(1, bias)
    before = fx.GraphModule({}, graph)(*values)
    assert unlist_linears(graph, context_of(graph, mode)) == Result(1)
    graph.lint()
    (call,) = graph.find_nodes(op="call_function", target=ops.single_int8_linear)
    assert call.args[1:3] == (6.0, "token") and (call.args[5] is not None) == bias
    assert not graph.find_nodes(op="call_function", target=ops.int8_linears)
    after = fx.GraphModule({}, graph)(*values)
    assert torch.equal(after[0], before[0])


def test_a_call_of_several_stays():
    graph, mode, _ = graph_of(2, bias=True)
    printed = str(graph)
    assert unlist_linears(graph, context_of(graph, mode)) == Result(0, Counter({SEVERAL: 1}))
    assert str(graph) == printed


def test_it_applies_to_wrappers_in_cpp_alone():
    (row,) = [each for each in order.PASSES if each.name == "unlist_linears"]
    assert row.applies(Context(None, lambda: None, cpp_wrapper=True)) == ""
    assert row.applies(Context(None, lambda: None)) == "Inductor's wrapper is in Python"
