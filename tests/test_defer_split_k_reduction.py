"""defer_split_k_reduction: which readers add up partial results for nothing, and what is left."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.int8.defer_split_k_reduction import (
    CALLED,
    LEAVES,
    NEXT_PRODUCT,
    defer_split_k_reduction,
)
from int8fx.testing.support import context_of

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
    ("readers", "reason"),
    [
        ([add], ""),
        ([view, add], ""),
        ([], LEAVES),
        ([view], LEAVES),
        ([view, attend, add], CALLED),
        ([multiply, add], CALLED),
    ],
    ids=lambda value: (
        "-".join(each.__name__ for each in value) if isinstance(value, list) else str(value)
    ),
)
def test_sums_are_left_to_kernels_that_inductor_writes(readers, reason):
    graph = fx.Graph()
    call = graph.call_function(products, (graph.placeholder("x"),))
    y = graph.call_function(operator.getitem, (call, 0))
    for reader in readers:
        y = reader(graph, y)
    graph.output(y)
    result = defer_split_k_reduction(graph, context_of(graph))
    assert (result.changed, result.refused) == ((0, {reason: 1}) if reason else (1, {}))
    assert call.args[1:] == (() if reason else (False,))


def test_one_result_that_nothing_reads_keeps_all_sums_of_a_call():
    graph = fx.Graph()
    call = graph.call_function(products, (graph.placeholder("x"),))
    q, k = (graph.call_function(operator.getitem, (call, index)) for index in range(2))
    graph.output((add(graph, q), k))
    result = defer_split_k_reduction(graph, context_of(graph))
    assert (result.changed, result.refused) == (0, {LEAVES: 1})


def test_the_next_product_adds_nothing_up_for_the_one_before():
    graph = fx.Graph()
    call = graph.call_function(products, (graph.placeholder("x"),))
    graph.output(quantize(graph, graph.call_function(operator.getitem, (call, 0))))
    result = defer_split_k_reduction(graph, context_of(graph))
    assert (result.changed, result.refused) == (1, {NEXT_PRODUCT: 1})
    assert len(call.args) == 1


def test_operators_that_do_not_ask_are_left_alone():
    graph = fx.Graph()
    graph.output(add(graph, add(graph, graph.placeholder("x"))))
    result = defer_split_k_reduction(graph, context_of(graph))
    assert (result.changed, result.refused) == (0, {})
