"""Scopes: the graphs inside of a graph, what their placeholders are bound to, and lifting."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from int8fx.passes.graph.scope import scopes

K = 4


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.other = nn.Linear(K, K), nn.Linear(K, K)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def checkpointed(model, x):
    return checkpoint(model.linear, x, use_reentrant=False)


def nested(model, x):
    return checkpoint(lambda x: checkpointed(model, x) + 1, x, use_reentrant=False)


def branches(model, x):
    return torch.cond(x.sum() > 0, lambda x: model.linear(x), lambda x: model.other(x), (x,))


def root_of(function):
    graphs = []
    torch._dynamo.reset()

    def keep(gm, inputs):
        graphs.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(Model(function), backend=keep, fullgraph=True)(torch.ones(2, K))
    gm, inputs = graphs[0]
    return scopes(gm), inputs


@pytest.mark.parametrize(
    ("function", "depths"),
    [(lambda model, x: model.linear(x), [0]), (checkpointed, [0, 1]), (nested, [0, 1, 2])],
    ids=["none", "one", "nested"],
)
def test_every_graph_is_walked_outside_first(function, depths):
    root, _ = root_of(function)

    def depth(scope):
        return 0 if scope.parent is None else 1 + depth(scope.parent)

    assert [depth(scope) for scope in root.walk()] == depths
    assert all(not scope.closed and not scope.repeats for scope in root.walk())


def test_a_placeholder_is_bound_to_an_operand_of_its_call():
    root, _ = root_of(nested)
    _, middle, inner = root.walk()
    weights = [node for node in root.graph.find_nodes(op="placeholder") if "weight" in node.name]
    bound = set()
    for node in inner.graph.find_nodes(op="placeholder"):
        outer = inner.outer(node)
        assert outer.graph is middle.graph
        bound.add(middle.outer(outer) if outer.op == "placeholder" else outer)
    assert set(weights) <= bound
    assert root.outer(weights[0]) is None


@pytest.mark.parametrize("function", [checkpointed, nested, branches], ids=lambda f: f.__name__)
def test_an_outer_value_is_carried_inside_once(function):
    root, inputs = root_of(function)
    before = root.gm(*inputs)
    last = root.graph.find_nodes(op="placeholder")[-1]
    with root.graph.inserting_after(last):
        added = root.graph.placeholder("added")
    added.meta["example_value"] = last.meta["example_value"]
    *_, inner = root.walk()
    lifted = inner.lift(added)
    assert inner.lift(added) is lifted
    assert lifted.graph is inner.graph and lifted.meta == added.meta
    assert root.lift(added) is added
    # All bodies of one call take the same operands.
    siblings = inner.parent.children
    sizes = {len(each.graph.find_nodes(op="placeholder")) for each in siblings}
    assert len(sizes) == 1
    for scope in root.walk():
        scope.graph.lint()
        scope.gm.recompile()
    with torch.no_grad():
        after = root.gm(*inputs, torch.zeros(K))
    assert torch.equal(after[0], before[0])


def test_a_lifted_value_is_bound_to_the_one_outside():
    root, _ = root_of(nested)
    last = root.graph.find_nodes(op="placeholder")[-1]
    with root.graph.inserting_after(last):
        added = root.graph.placeholder("added")
    added.meta["example_value"] = last.meta["example_value"]
    _, middle, inner = root.walk()
    outer = inner.outer(inner.lift(added))
    assert middle.outer(outer) is added


def test_the_body_of_an_unknown_operator_is_closed_with_its_name():
    root, _ = root_of(checkpointed)
    _, body = root.walk()

    def unknown(body, *operands):
        raise NotImplementedError

    body.call.target = unknown
    _, closed = scopes(root.gm).walk()
    assert closed.closed == "inside unknown, which weights cannot be carried into yet"
    placeholder = closed.graph.find_nodes(op="placeholder")[0]
    assert closed.outer(placeholder) is None


def test_a_body_that_two_calls_share_is_closed():
    root, _ = root_of(checkpointed)
    _, body = root.walk()
    call = body.call
    with root.graph.inserting_after(call):
        root.graph.call_function(call.target, call.args, call.kwargs)
    closed = [scope.closed for scope in scopes(root.gm).walk() if scope.parent is not None]
    assert closed == ["inside a body that 2 calls share"] * 2
