"""defer_split_k_reduction: which readers take the sum of partial results for nothing, and which results are left."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.int8.defer_split_k_reduction import defer_split_k_reduction

_library = torch.library.Library("int8fx_test_sums", "DEF")
_library.define("products(Tensor x, bool sums=True) -> Tensor[]")
products = torch.ops.int8fx_test_sums.products.default


def add(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return graph.call_function(torch.add, (y, 1))


def view(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return graph.call_method("transpose", (graph.call_method("view", (y, 2, 3)), 0, 1))


def attend(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return graph.call_function(F.scaled_dot_product_attention, (y, y, y))


def multiply(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return graph.call_method("matmul", (y, y))


def quantize(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return add(graph, graph.call_function(operator.getitem, (graph.call_function(products, (y,)), 0)))


@pytest.mark.parametrize(
    ("readers", "left"),
    [
        ([add], True),
        ([view, add], True),
        ([], False),
        ([view], False),
        ([view, attend, add], False),
        ([multiply, add], False),
    ],
    ids=lambda value: (
        "-".join(each.__name__ for each in value) if isinstance(value, list) else str(value)
    ),
)
def test_sums_are_left_to_kernels_that_inductor_writes(readers, left):
    graph = fx.Graph()
    call = graph.call_function(products, (graph.placeholder("x"),))
    y = graph.call_function(operator.getitem, (call, 0))
    for reader in readers:
        y = reader(graph, y)
    graph.output(y)
    assert fuse_sums(graph) == left
    assert call.args[1:] == ((False,) if left else ())


def test_one_result_that_nothing_reads_keeps_all_sums_of_a_call():
    graph = fx.Graph()
    call = graph.call_function(products, (graph.placeholder("x"),))
    q, k = (graph.call_function(operator.getitem, (call, index)) for index in range(2))
    graph.output((add(graph, q), k))
    assert fuse_sums(graph) == 0


def test_the_next_product_adds_nothing_up_for_the_one_before():
    graph = fx.Graph()
    call = graph.call_function(products, (graph.placeholder("x"),))
    graph.output(quantize(graph, graph.call_function(operator.getitem, (call, 0))))
    assert fuse_sums(graph) == 1
    assert len(call.args) == 1


def test_operators_that_do_not_ask_are_left_alone():
    graph = fx.Graph()
    graph.output(add(graph, add(graph, graph.placeholder("x"))))
    assert fuse_sums(graph) == 0
