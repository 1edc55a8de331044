"""Weight expressions: what is a weight, evaluated once, and what is computed."""

import operator

import pytest
import torch
from torch import fx, nn

from int8fx.passes.graph.scope import scopes
from int8fx.passes.graph.weight_expression import (
    TRANSPOSE,
    Step,
    WeightExpression,
    computed_of_weights,
    is_view_or_cast,
    resolve,
    without_broadcast,
)

N, K = 4, 6


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(N, K)), nn.Parameter(torch.randn(N, K))
        self.function = function

    def forward(self, x):
        return x.sum() + self.function(self.w, self.v, x)


def traced(function):
    """The root scope of a function of two weights and an activation, and the node of its result."""
    graphs = []
    torch._dynamo.reset()

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    model = Model(function)
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(torch.ones(3, K))
    root = scopes(graphs[0])
    total = root.graph.output_node().all_input_nodes[0]
    return model, root, total.args[1]


def path_of(node: fx.Node) -> str | None:
    return node.name.split("parameters_")[1].strip("_") if "parameters" in node.name else None


def resolved(function) -> tuple[Model, WeightExpression | None]:
    model, root, node = traced(function)
    return model, resolve(node, root, lambda each: path_of(each) is not None)


WEIGHTS = {
    "itself": (lambda w, v, x: w, ""),
    "t": (lambda w, v, x: w.t(), ".t()"),
    "T": (lambda w, v, x: w.T, None),
    "mT": (lambda w, v, x: w.mT, None),
    "torch.transpose": (lambda w, v, x: torch.transpose(w, 0, 1), ".transpose(0, 1)"),
    "a slice": (lambda w, v, x: w[1:3], ".getitem(slice(1, 3, None))"),
    "a row of a chunk": (lambda w, v, x: w.chunk(2, dim=0)[1], None),
    "a cast": (lambda w, v, x: w.half().t(), ".half().t()"),
    "to": (lambda w, v, x: w.to(dtype=torch.bfloat16), None),
    "views": (lambda w, v, x: w.unsqueeze(0).expand(8, -1, -1).reshape(-1, K), None),
    "contiguous": (lambda w, v, x: w.t().contiguous(), ".t().contiguous()"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_views_and_casts_of_a_parameter_are_a_weight(name):
    function, recipe = WEIGHTS[name]
    model, expression = resolved(function)
    expected = function(model.w, model.v, None)
    assert path_of(expression.placeholder) == "w"
    assert torch.equal(expression.evaluate(model.w), expected)
    without_contents = expression.meta()
    assert without_contents.is_meta
    assert without_contents.shape == expected.shape and without_contents.dtype == expected.dtype
    if recipe is not None:
        assert expression.recipe == recipe


@pytest.mark.parametrize(
    "function",
    [
        lambda w, v, x: w * 2,
        lambda w, v, x: torch.cat([w, v]),
        lambda w, v, x: w[x.sum().long() * 0 + torch.arange(2)],
        lambda w, v, x: w.view(x.shape[0] + 1, -1) + 0,
        lambda w, v, x: x,
    ],
    ids=["scaled", "cat", "an index that is computed", "added", "an activation"],
)
def test_what_is_computed_is_no_weight(function):
    assert resolved(function)[1] is None


def test_equal_steps_of_one_parameter_have_one_recipe():
    _, first = resolved(lambda w, v, x: w.t()[:2])
    _, second = resolved(lambda w, v, x: w.t()[:2])
    _, third = resolved(lambda w, v, x: w.t()[:3])
    assert first.recipe == second.recipe != third.recipe


def test_a_step_more():
    _, expression = resolved(lambda w, v, x: w)
    longer = expression.then(TRANSPOSE)
    value = torch.randn(N, K)
    assert torch.equal(longer.evaluate(value), value.t())
    assert (expression.recipe, longer.recipe) == ("", ".transpose(0, 1)")


@pytest.mark.parametrize(
    "step",
    [
        Step("call_method", "to", ("cpu",), ()),
        Step("call_method", "to", (torch.device("cpu"), torch.float16), ()),
        Step("call_method", "to", (), (("device", "cpu"), ("dtype", torch.float16))),
    ],
    ids=str,
)
def test_a_move_to_a_device_is_left_out_on_the_meta_device(step):
    expression = WeightExpression(None, (step, TRANSPOSE))
    meta = expression.on_meta(torch.empty(N, K, device="meta"))
    expected = expression.evaluate(torch.empty(N, K))
    assert meta.is_meta and meta.shape == expected.shape and meta.dtype == expected.dtype


@pytest.mark.parametrize(
    ("function", "computed"),
    [
        (lambda w, v, x: torch.cat([w, v]), "cat of w, v"),
        (lambda w, v, x: (w * 2).t() + v.t(), "add, mul of w, v"),
        (lambda w, v, x: w.t(), ""),
        (lambda w, v, x: w + x[:1].sum(), ""),
        (lambda w, v, x: torch.zeros(2, 2) + 1, ""),
    ],
    ids=["cat", "scaled sum", "a view", "of an activation", "a constant"],
)
def test_what_a_value_is_computed_of(function, computed):
    _, root, node = traced(function)
    assert computed_of_weights(node, root, path_of) == computed


def test_a_matrix_that_is_repeated_for_a_batch_is_one_matrix():
    for function in (
        lambda w, v, x: w.unsqueeze(0).expand(5, N, K),
        lambda w, v, x: w[None],
        lambda w, v, x: torch.broadcast_to(w, (2, N, K)),
    ):
        _, _, node = traced(function)
        base = without_broadcast(node)
        assert base.op == "placeholder" and path_of(base) == "w"


def test_a_batch_of_other_matrices_stays():
    for function in (lambda w, v, x: torch.stack([w, v]), lambda w, v, x: w.view(2, 2, K)):
        _, _, node = traced(function)
        assert without_broadcast(node) is node


def test_calls_that_look_at_their_argument_and_calls_that_do_not():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert is_view_or_cast(graph.call_method("view", (x, 2)))
    assert is_view_or_cast(graph.call_function(operator.getitem, (x, 0)))
    assert is_view_or_cast(graph.call_function(getattr, (x, "mT")))
    assert not is_view_or_cast(graph.call_function(getattr, (x, "shape")))
    assert not is_view_or_cast(graph.call_method("add", (x, 1)))
    assert not is_view_or_cast(graph.call_function(torch.add, (x, 1)))
    assert not is_view_or_cast(x)
