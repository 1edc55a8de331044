"""Which calls name themselves ones that overwrite an argument."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int8fx.passes.graph.mutation import writes_in_place


@pytest.mark.parametrize(
    ("function", "written"),
    [
        (lambda x: x.add_(1), True),
        (lambda x: x.__setitem__(0, 1), True),
        (lambda x: torch.relu(x, out=x), True),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: torch.ops.aten.add_.Tensor(x, x), True),
        (lambda x: x + 1, False),
        (lambda x: operator.and_(x, x), False),
        (lambda x: x.__add__(1), False),
        (lambda x: torch.ops.aten.add.Tensor(x, x), False),
    ],
)
def test_writes_are_recognised(function, written):
    class Call(nn.Module):
        def forward(self, x):
            return function(x)

    tracer = torch.fx.Tracer()
    tracer._autowrap_function_ids.add(id(torch.relu))
    try:
        graph = tracer.trace(Call())
    except TypeError:  # a proxy has no item assignment
        graph = torch.fx.Graph()
        node = graph.placeholder("x")
        graph.call_method("__setitem__", (node, 0, 1))
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    assert [writes_in_place(node) for node in calls] == [written]
