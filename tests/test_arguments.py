"""Arguments by the names of an operator's schema, wherever in a call they stand."""

import pytest
import torch
from torch import fx

from int8fx.passes.graph.arguments import argument, arranged, given, set_argument, takes

_library = torch.library.Library("int8fx_test_arguments", "DEF")
_library.define("f(Tensor x, float threshold, str kind='row', *, bool sums=True) -> Tensor")
f = torch.ops.int8fx_test_arguments.f.default


def in_python(x, weights, biases=()):
    return x


def call(target, *args, **kwargs) -> fx.Node:
    return fx.Graph().call_function(target, args, kwargs)


SPELLINGS = {
    "positions": call(f, 1, 6.0, "row", sums=True),
    "names": call(f, x=1, threshold=6.0, kind="row", sums=True),
    "mixed": call(f, 1, threshold=6.0),
    "defaults": call(f, 1, 6.0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_call_in_every_spelling(name):
    node = SPELLINGS[name]
    found = [argument(node, each) for each in ("x", "threshold", "kind", "sums")]
    assert found == [1, 6.0, "row", True]


def test_what_is_given_leaves_defaults_out():
    assert given(call(f, 1, threshold=6.0)) == {"x": 1, "threshold": 6.0}


def test_functions_without_a_schema_have_their_parameters():
    assert given(call(in_python, 1, weights=[2])) == {"x": 1, "weights": [2]}
    assert argument(call(in_python, 1, [2]), "biases") == ()
    assert arranged(in_python, {"weights": [2], "x": 1}) == ((1, [2]), {})


@pytest.mark.parametrize(
    ("node", "name", "args", "kwargs"),
    [
        (call(f, 1, 6.0), "threshold", (1, 3.0), {}),
        (call(f, 1, threshold=6.0), "threshold", (1, 3.0), {}),
        (call(f, 1, 6.0), "kind", (1, 6.0, 3.0), {}),
        (call(f, 1, 6.0), "sums", (1, 6.0), {"sums": 3.0}),
        (call(f, x=1), "kind", (1,), {"kind": 3.0}),
    ],
    ids=str,
)
def test_an_argument_is_set_where_the_schema_has_it(node, name, args, kwargs):
    set_argument(node, name, 3.0)
    assert (node.args, node.kwargs) == (args, kwargs)
    assert argument(node, name) == 3.0


def test_what_an_operator_does_not_take_is_named():
    node = call(f, 1, 6.0)
    with pytest.raises(TypeError, match="gives no 'bias'"):
        argument(node, "bias")
    with pytest.raises(TypeError, match="gives no 'x'"):
        argument(call(f), "x")
    with pytest.raises(TypeError, match=r"has no bias; it has x, threshold, kind, sums"):
        set_argument(node, "bias", None)
    assert node.args == (1, 6.0)


def test_what_takes_an_argument():
    assert takes(f, "sums") and not takes(f, "bias")
    assert not takes("add", "sums") and not takes(torch.relu, "input")
