"""The table of passes: one name everywhere, and what a row does in a compile."""

import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

import int8fx
from int8fx.passes import order
from int8fx.passes.contract import Context, Pass, Result
from int8fx.passes.graph.scope import scopes
from int8fx.passes.outcome import Outcome, together
from int8fx.testing.support import compile_once

ROOT = Path(__file__).parents[1]
NAMES = [each.name for each in order.PASSES]


def test_a_pass_is_called_as_its_function_is():
    assert [each.rewrite.__name__ for each in order.PASSES] == NAMES
    assert len(set(NAMES)) == len(NAMES)


def test_the_page_lists_every_pass_in_its_order():
    text = (ROOT / "passes" / "README.md").read_text()
    table = text[text.index("## The table") : text.index("## The contract")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == NAMES


def test_every_pass_has_a_test_of_its_name():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    elsewhere = {"attend_few_rows": "test_attend", "attend_many_rows": "test_attend"}
    for name in NAMES:
        file = elsewhere.get(name, f"test_{name}")
        exists = (ROOT / "tests" / f"{file}.py").exists()
        assert exists or f"{name}(" in tests, name


def test_the_log_and_the_report_name_what_ran_and_what_did_not(caplog):
    model = nn.Linear(32, 32).requires_grad_(False)
    with caplog.at_level(logging.DEBUG, logger="int8fx"):
        _, report = compile_once(model, torch.randn(3, 32))
    assert [each.name for each in report.passes] == NAMES
    logged = {record.getMessage() for record in caplog.records}
    assert {str(each) for each in report.passes} <= logged
    lines = str(report).splitlines()
    assert "  pass lower: 1 changed" in lines
    assert "  pass fuse_norms: not run, no operator of cpu takes a norm and its linears" in lines
    assert not any("group_heads" in line for line in lines)  # it has nothing to say


def test_a_graph_without_an_int8_linear_goes_through_no_pass():
    model = nn.Linear(32, 32).requires_grad_(False)
    _, report = compile_once(model, torch.randn(3, 32), backend_options={"skip": ["*"]})
    assert report.passes == ()


class TwoGraphs(nn.Module):
    """A graph with two sub-graphs, each with an addition."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x + 2, (x,)) + 3


def count(graph: fx.Graph, context: Context) -> Result:
    context.memory()
    found = sum("add" in str(node.target) for node in graph.nodes)
    return Result(found, Counter({"of a graph": 1}))


def root_of_two_graphs():
    graphs = []
    torch._dynamo.reset()

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch.compile(TwoGraphs(), backend=keep, fullgraph=True)(torch.ones(3))
    return scopes(graphs[0])


def test_a_row_runs_on_every_graph_and_asks_for_the_memory_once():
    asked = []
    written = SimpleNamespace(is_written=True)
    context = Context(None, lambda: asked.append("memory") or written)
    root = root_of_two_graphs()
    row = Pass("count", count)
    assert row.run(root, context) == Outcome("count", 3, {"of a graph": 3})
    assert len(asked) == 1
    row.run(root, context)
    assert len(asked) == 2


def test_the_memory_of_graphs_that_write_to_nothing_serves_the_next_row_as_well():
    asked = []
    unwritten = SimpleNamespace(is_written=False)
    context = Context(None, lambda: asked.append("memory") or unwritten)
    root = root_of_two_graphs()
    for _ in range(2):
        Pass("count", count).run(root, context)
    assert len(asked) == 1
    assert context.memory_now() is unwritten and len(asked) == 2


def test_a_row_that_does_not_apply_touches_no_graph():
    def never(graph, context):
        raise AssertionError

    row = Pass("never", never, lambda context: "there is no reason to")
    assert row.run(root_of_two_graphs(), Context(None, lambda: None)) == Outcome(
        "never", skipped="there is no reason to"
    )


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        ({}, ""),
        ({"for_inductor": False}, "the graph runs operator by operator"),
        ({"needs_autograd": True}, "a gradient may be asked for"),
        ({"for_inductor": False, "needs_autograd": True}, "the graph runs operator by operator"),
    ],
    ids=str,
)
def test_the_first_condition_that_does_not_hold_is_the_reason(conditions, reason):
    (one_row,) = [each for each in order.PASSES if each.name == "one_row"]
    assert one_row.applies(Context(None, lambda: None, **conditions)) == reason


def test_gradients_keep_passes_without_a_backward_away():
    model = nn.Linear(32, 32).requires_grad_(False)
    torch._dynamo.reset()
    x = torch.randn(3, 32, requires_grad=True)
    with int8fx.collect_reports() as reports:
        torch.compile(model, backend="llmint8")(x).sum().backward()
    skipped = {each.name for each in reports[0].passes if each.skipped == "a gradient may be asked for"}
    assert skipped == {
        "fuse_norms",
        "attend_few_rows",
        "attend_many_rows",
        "one_row",
        "equal_lengths",
        "outline",
    }


def test_outcomes_of_several_graphs_are_added_up():
    first = [Outcome("a", 1, {"x": 1}), Outcome("b", skipped="no")]
    second = [Outcome("a", 2, {"x": 1, "y": 3}), Outcome("b", 4)]
    both = together([first, second])
    assert both == (Outcome("a", 3, {"y": 3, "x": 2}), Outcome("b", 4))
    assert together([first, first])[1] == Outcome("b", skipped="no")
    assert together([]) == ()
    assert str(both[0]) == "a: 3 changed; left 3 x y, 2 x x"
