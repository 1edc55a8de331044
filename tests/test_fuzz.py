"""Random graphs against float64: every int8 linear inside the derived bound, and nothing else moved.

``python benchmarks/fuzz.py --graphs 2000`` runs more of the same.
"""

import copy

import pytest
import torch
from checked import checking
from hypothesis import HealthCheck, given, settings
from random_graphs import LINEARS, REFUSED, RandomModel, programs

import int8fx

SETTINGS = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# What is left where each linear answers with the float64 product: the other operators' rounding, in
# another order where a bias moved into its linear.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.06}


def check(program, with_inductor=False):
    """Raises:
    AssertionError: a linear was left alone, or is outside its bound, or another operator computes
        something else than in the float model.
    """
    model = RandomModel(program)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(model.x)
        with checking(exact=True) as seen, int8fx.collect_reports() as reports:
            y = compiled(model, program)
    decisions = reports[0].decisions if reports else ()
    refused = {reason for _, reason in REFUSED.values()}
    assert all(decision.accepted or decision.reason in refused for decision in decisions), reports[0]
    assert program["steps"][-1][0] not in LINEARS or seen.linears > 0
    assert seen.worst <= 1, f"{seen.worst_call}: {seen.worst:.2f} of its bound"
    assert_same_form(y, expected)
    assert_close(y, expected, program)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if with_inductor:
        with torch.no_grad(), checking(exact=True, inductor=True) as through:
            y = compiled(model, program)
        assert through.worst <= 1, f"{through.worst_call}: {through.worst:.2f} of its bound"
        assert_same_form(y, expected)
        assert_close(y, expected, program)
    return seen


def compiled(model, program):
    torch._dynamo.reset()
    given = {name: program[name] for name in ("threshold", "decomposition")}
    given["only"] = ["*"]  # by default few columns and low-rank factors stay in float
    return torch.compile(model, backend="llmint8", fullgraph=True, options=given)(model.x)


def assert_close(y, expected, program):
    rounded = program.get("autocast", "none") != "none"
    rounding = ROUNDING[torch.bfloat16 if rounded else y.dtype]
    size = expected.abs().amax().clamp_min(1) if expected.numel() else 1
    assert ((y - expected).abs() <= rounding * size).all()


def assert_same_form(y, expected):
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert y.isfinite().all() == expected.isfinite().all()
    assert y.is_contiguous() or not expected.is_contiguous()


# What ``benchmarks/fuzz.py`` found, and was mended.
COUNTEREXAMPLES = [
    {
        "shape": (1, 1, 1),
        "steps": [("experts", 0, 0, 1, 0)],
        "dtype": "float32",
        "threshold": 0.0,
        "decomposition": "column",
        "seed": 0,
    },
    {
        "shape": (1, 1, 1),
        "steps": [("addmm", 0, 0, 1, 0)],
        "dtype": "float32",
        "threshold": 0.0,
        "decomposition": "token",
        "seed": 0,
        "autocast": "all",
    },
]


@pytest.mark.parametrize("program", COUNTEREXAMPLES, ids=str)
def test_counterexamples(program):
    check(program)


@SETTINGS
@given(programs())
def test_random_graphs(program):
    check(program)


@settings(SETTINGS, max_examples=3)
@given(programs())
def test_random_graphs_compiled_with_inductor(program):
    check(program, with_inductor=True)
