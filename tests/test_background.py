"""The option ``background``: a graph runs operator by operator until Inductor, in a fork, is done."""

import logging
import time

import pytest
import torch
from torch import nn

import int8fx
from int8fx.compiler.background import CompiledLater

K, N, SECONDS = 64, 48, 300


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def model():
    return Model().eval().requires_grad_(False)


@pytest.fixture
def log(caplog):
    """What the option has told."""
    caplog.set_level(logging.INFO, "int8fx.compiler")
    return lambda: [each.getMessage() for each in caplog.records]


def compiled(model, **options):
    return torch.compile(model, backend="llmint8", options={"background": True, **options})


def until(happened):
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def test_a_call_answers_before_the_compile_is_done_and_changes_then(model, log):
    x = torch.randn(5, K)
    run = compiled(model, threshold=2.0)
    with torch.no_grad(), int8fx.collect_reports() as reports:
        before = run(x)
        assert not any("runs compiled from now on" in each for each in log())
        assert any("runs operator by operator while process" in each for each in log())

        def changed():
            run(x)
            return any("runs compiled from now on" in each for each in log())

        until(changed)
        after = run(x)
    assert [each.path for each in reports[0].accepted] == ["up", "down"]
    at_once = torch.compile(model, backend="llmint8", options={"threshold": 2.0})
    with torch.no_grad():
        assert after.equal(at_once(x))
    # The same int8 products; the float operators around them may round in another order.
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_weights_that_change_are_seen_before_and_after(model, log):
    x = torch.randn(5, K)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        model.up.weight.mul_(2)
        doubled = torch.compile(model, backend="llmint8", options={"threshold": 6.0})
        torch.testing.assert_close(run(x), doubled(x))
        until(lambda: run(x) is not None and any("runs compiled" in each for each in log()))
        model.down.weight.mul_(-1)
        torch.testing.assert_close(run(x), doubled(x))


def test_sizes_may_vary(model, log):
    """One graph for all of them, before and after."""
    run = torch.compile(model, backend="llmint8", options={"background": True}, dynamic=True)
    at_once = torch.compile(model, backend="llmint8", options={"threshold": 6.0}, dynamic=True)
    inputs = [torch.randn(rows, K) for rows in (5, 7, 40)]
    with torch.no_grad(), int8fx.collect_reports() as reports:
        before = [run(x) for x in inputs]
        until(lambda: run(inputs[0]) is not None and any("runs compiled" in each for each in log()))
        after = [run(x) for x in inputs]
        assert len(reports) == 1
        expected = [at_once(x) for x in inputs]
    for early, late, y in zip(before, after, expected, strict=True):
        assert late.equal(y)
        torch.testing.assert_close(early, late, rtol=1e-5, atol=1e-5)


def test_a_graph_that_compiles_for_some_sizes_only_stays_as_it_is(log):
    """Dynamo would call it with others, and nothing would tell."""
    conditions = ["s0 >= 2"]

    def compile_graph():
        conditions.append("Eq(s0, 5)")
        return lambda x: x + 1

    run = CompiledLater(lambda x: x, compile_graph, lambda: list(conditions))
    until(lambda: run(3) == 3 and any("stays operator by operator" in each for each in log()))
    assert run(3) == 3
    assert any("it wants Eq(s0, 5)" in each for each in log())


def test_a_compile_that_fails_in_the_fork_fails_here(log):
    """Where its error is seen."""

    def compile_graph():
        raise RuntimeError("no compiler")

    run = CompiledLater(lambda x: x, compile_graph, list)
    with pytest.raises(RuntimeError, match="no compiler"):
        until(lambda: run(3) != 3)
    assert any("compile in the background failed" in each for each in log())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"options": {"background": True, "release_weights": True}}, "release_weights gives up"),
    ],
)
def test_what_cannot_wait_is_compiled_at_once_and_says_why(model, log, how, reason):
    run = torch.compile(model, **{"backend": "llmint8", "options": {"background": True}, **how})
    with torch.no_grad():
        run(torch.randn(5, K))
    assert any("not compiled in the background" in each and reason in each for each in log())


def test_a_graph_with_gradients_is_compiled_at_once(model, log):
    run = compiled(model)
    x = torch.randn(5, K, requires_grad=True)
    run(x).sum().backward()
    assert x.grad is not None
    assert any("a gradient may be asked for" in each for each in log())
