"""The plugin that runs third-party tests: what it swaps, what it widens, and what it leaves alone."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import int8fx

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "int8fx.testing.as_backend", "-p", "no:cacheprovider", "-q")

SUITE = """
import torch
from torch import nn
import pytest

def model(K=64, N=32):
    torch.manual_seed(0)
    return nn.Linear(K, N).requires_grad_(False), torch.randn(4, K)

def compiled(how=lambda linear: torch.compile(linear)):
    torch._dynamo.reset()
    linear, x = model()
    return how(linear)(x), linear(x)

# --- passes

@pytest.mark.parametrize("how", [
    torch.compile,
    lambda linear: torch.compile(linear, backend="inductor", options={"max_autotune": False}),
    lambda linear: torch.compile()(linear),
])
def test_compile(how):
    y, expected = compiled(how)
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected)

def test_module_compile():
    torch._dynamo.reset()
    class Block(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

    linear, x = model()
    block = Block(linear)
    expected = block(x)
    block.compile()
    assert torch.allclose(block(x), expected)

def test_nested():
    y, expected = compiled()
    torch.testing.assert_close({"a": [y]}, {"a": [expected]})

def test_another_backend_stays():
    y, expected = compiled(lambda linear: torch.compile(linear, backend="eager"))
    assert torch.equal(y, expected)

# --- fails

def test_a_wrong_result():
    y, expected = compiled()
    torch.testing.assert_close(y * 1.2, expected)

def test_the_wrong_shape():
    y, expected = compiled()
    torch.testing.assert_close(y[:2], expected)

def test_integers():
    y, expected = compiled()
    torch.testing.assert_close((y * 1e4).long(), (expected * 1e4).long())

def test_double():
    y, expected = compiled()
    torch.testing.assert_close(y.double(), expected.double())

def test_no_linear_in_int8():
    torch.compile(torch.relu)(torch.ones(3))
    assert torch.allclose(torch.tensor([1.0]), torch.tensor([1.01]))

def test_exactly():
    y, expected = compiled()
    assert torch.equal(y, expected)

def test_a_longer_list():
    y, expected = compiled()
    torch.testing.assert_close([y, y], [expected])
"""


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """pytester gives each test a home of its own; the C++ kernels would be compiled there anew."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)


@pytest.fixture(autouse=True, scope="module")
def imported():
    """pytester forgets what a test imports. A second import would register operators twice."""
    torch.compile(nn.Linear(8, 8).requires_grad_(False), backend="llmint8")(torch.randn(2, 8))


def test_a_suite_runs_on_llmint8_and_nothing_is_widened_that_was_not_declared(pytester):
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(passed=6, failed=7)
    wrong = ("wrong_result", "wrong_shape", "integers", "double", "no_linear", "exactly", "longer")
    for name in wrong:
        result.stdout.fnmatch_lines([f"FAILED *{name}*"])
    result.stdout.fnmatch_lines(
        [
            "12 graphs compiled, 11 linears in int8",
            "5 comparisons needed the tolerance of 0.05 of the largest expected value",
            *["  1  *::test_compile*"] * 3,
            "  1  *::test_module_compile",
            "  1  *::test_nested",
        ]
    )


def test_options_reach_the_backend(pytester):
    before = torch.compile, torch.allclose, torch.testing.assert_close
    config = pytester.parseconfigure(*PLUGIN, '--llmint8-options={"skip": ["*"]}')
    linear = nn.Linear(8, 8).requires_grad_(False)
    torch._dynamo.reset()
    with int8fx.collect_reports() as reports:
        torch.compile(linear)(torch.randn(2, 8))
    assert reports[0].decisions[0].reason == "skip: matches '*'"
    config._ensure_unconfigure()
    assert (torch.compile, torch.allclose, torch.testing.assert_close) == before


def test_a_tolerance_of_zero_widens_nothing(pytester):
    before = torch.allclose, torch.Tensor.allclose, torch.testing.assert_close
    pytester.parseconfigure(*PLUGIN, "--llmint8-tolerance=0")
    assert (torch.allclose, torch.Tensor.allclose, torch.testing.assert_close) == before


def test_a_wrong_tolerance_is_refused(pytester):
    with pytest.raises(pytest.UsageError, match=r"--llmint8-tolerance=-1.0: allowed is a number >= 0"):
        pytester.parseconfigure(*PLUGIN, "--llmint8-tolerance=-1")
