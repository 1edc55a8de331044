"""Rerun: what is left out, what is not, and that the result is that of a whole run."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from int8fx.analysis.rerun import Rerun


class Counted:
    """``x -> x * factor``, which counts its calls."""

    def __init__(self, name: str) -> None:
        self.__name__, self.factor, self.calls = name, 2.0, 0

    def __call__(self, x):
        self.calls += 1
        return x * self.factor


@pytest.fixture
def three():
    return [Counted(name) for name in ("first", "second", "third")]


def chain(functions, between=lambda graph, node: node) -> tuple[Rerun, list[fx.Node]]:
    """The functions one after the other; ``between`` may put something after the first."""
    graph = fx.Graph()
    node, calls = graph.placeholder("x"), []
    for function in functions:
        node = graph.call_function(function, (node,))
        calls.append(node)
        if len(calls) == 1:
            node = between(graph, node)
    graph.output((node,))
    return Rerun(fx.GraphModule({}, graph)), calls


def test_what_comes_before_the_change_runs_once(three):
    rerun, calls = chain(three)
    x = torch.ones(2)
    for factor in (3.0, 5.0):
        three[1].factor = factor
        assert torch.equal(rerun.run_from([calls[1]], [x])[0], x * 4 * factor)
    assert [each.calls for each in three] == [1, 2, 2]
    three[1].factor = 2.0
    three[2].factor = 7.0
    assert torch.equal(rerun.run_from([calls[2]], [x])[0], x * 28)
    assert [each.calls for each in three] == [1, 3, 3]
    three[0].factor = 1.0  # an earlier one than in the last run
    assert torch.equal(rerun.run_from([calls[0]], [x])[0], x * 14)
    assert [each.calls for each in three] == [2, 4, 4]
    assert torch.equal(rerun.run_from([], [x])[0], x * 14)


def test_other_inputs_begin_again(three):
    rerun, calls = chain(three)
    x = torch.ones(2)
    rerun.run_from([calls[2]], [x])
    assert torch.equal(rerun.run_from([calls[2]], [x + 1])[0], torch.full((2,), 16.0))
    x = torch.ones(2)
    rerun.run_from([calls[2]], [x])
    x += 2
    assert torch.equal(rerun.run_from([calls[2]], [x])[0], torch.full((2,), 24.0))


def test_a_graph_that_writes_to_its_values_is_run_whole(three):
    rerun, calls = chain(three, lambda graph, node: graph.call_method("add_", (node, 1)))
    for _ in range(3):
        assert torch.equal(rerun.run_from([calls[2]], [torch.ones(2)])[0], torch.full((2,), 12.0))
        assert rerun.run_from([calls[2]], [torch.zeros(2)])[0][0] == 4
    assert three[0].calls == 6


def test_a_write_that_no_name_tells_of_is_seen(three):
    rerun, calls = chain(
        three, lambda graph, node: graph.call_function(F.leaky_relu, (node, 3.0, True))
    )
    for _ in range(3):
        assert torch.equal(rerun.run_from([calls[2]], [-torch.ones(2)])[0], torch.full((2,), -24.0))
    assert three[0].calls == 3


def test_no_run_begins_under_autocast():
    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    graph = fx.Graph()
    x = graph.placeholder("x")
    entered = graph.call_function(enter, ("cpu", torch.bfloat16, True, None))
    inside = graph.call_function(torch.mm, (x, x))
    graph.call_function(leave, (entered,))
    after = graph.call_function(torch.mm, (inside, inside))
    graph.output((inside, after))
    rerun, given = Rerun(fx.GraphModule({}, graph)), torch.eye(2)
    for changed in (after, inside, after, inside):
        values = rerun.run_from([changed], [given])
        assert [value.dtype for value in values] == [torch.bfloat16] * 2
        assert not torch.is_autocast_enabled("cpu")
