"""Emitter: calls are inserted with the value that each would have, or not at all."""

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from int8fx.kernels.ops import int8_linear as ops
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.weight_expression import Step


@pytest.fixture
def emit():
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    x.meta |= {
        "example_value": mode.from_tensor(torch.empty(2, 3)),
        "stack_trace": "File model.py, line 1",
        "nn_module_stack": {"0": ("fc", nn.Linear)},
    }
    return Emitter(graph, mode, x)


def test_a_call_knows_its_shape_dtype_and_where_it_comes_from(emit):
    node = emit.call(torch.matmul, emit.origin, emit.method("t", emit.origin))
    value = node.meta["example_value"]
    assert (tuple(value.shape), value.dtype) == ((2, 2), torch.float32)
    for key in ("stack_trace", "nn_module_stack"):
        assert node.meta[key] == emit.origin.meta[key]


def test_an_origin_without_a_trace_leaves_none(emit):
    del emit.origin.meta["stack_trace"]
    assert "stack_trace" not in emit.method("t", emit.origin).meta


def test_items_of_several_results(emit):
    quantized = emit.call(ops.quantize, emit.origin, 6.0, "token")
    x_int8, x_scale = (emit.item(quantized, index) for index in range(2))
    assert x_int8.meta["example_value"].dtype == torch.int8
    assert tuple(x_scale.meta["example_value"].shape) == (2,)


def test_a_call_by_names_stands_in_the_order_of_the_schema(emit):
    node = emit.named(ops.quantize, decomposition="token", threshold=6.0, x=emit.origin)
    assert (node.args, node.kwargs) == ((emit.origin, 6.0, "token"), {})
    with pytest.raises(TypeError, match="has no bias; it has x, threshold, decomposition"):
        emit.named(ops.quantize, x=emit.origin, bias=None)


def test_steps_follow_one_another(emit):
    steps = [
        Step("call_method", "t", (), ()),
        Step("call_method", "reshape", (1, -1), ()),
    ]
    node = emit.steps(emit.origin, steps)
    assert tuple(node.meta["example_value"].shape) == (1, 6)
    assert [each.target for each in emit.graph.nodes if each.op == "call_method"] == ["t", "reshape"]
    assert emit.steps(node, []) is node


def test_an_impossible_call_fails_when_it_is_inserted(emit):
    with pytest.raises(RuntimeError, match="reduction dim"):
        emit.call(torch.matmul, emit.origin, emit.origin)


def test_no_gradient_is_recorded(emit):
    emit.origin.meta["example_value"].requires_grad_()
    node = emit.call(torch.matmul, emit.origin, emit.method("t", emit.origin))
    assert not node.meta["example_value"].requires_grad


def test_calls_stand_at_the_insertion_point(emit):
    last = emit.graph.output(emit.origin)
    with emit.graph.inserting_before(last):
        first = emit.method("t", emit.origin)
        second = emit.method("t", first)
    assert list(emit.graph.nodes) == [emit.origin, first, second, last]
