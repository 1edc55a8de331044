"""Random graphs against float64: every int8 linear inside the derived bound, and nothing else moved.

``python benchmarks/fuzz.py --graphs 2000`` runs more of the same.
"""

import copy

import pytest
import torch
from checked import checking
from hypothesis import HealthCheck, given, settings
from random_graphs import CHANGES_WIDTH, WRITING_WEIGHTS, RandomModel, programs

import int8fx
from int8fx.passes.select import WRITTEN

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
    expected, x = run(model, model)
    after = copy.deepcopy(model.state_dict())
    with checking(exact=True) as seen, int8fx.collect_reports() as reports:
        answer = run(model, compiled(model, program))
    decisions = reports[0].decisions if reports else ()
    writes = any(name in WRITING_WEIGHTS for name, *_ in program["steps"])
    refused = [decision.reason for decision in decisions if not decision.accepted]
    assert all(writes and reason.startswith(WRITTEN) for reason in refused), reports[0]
    assert writes or program["steps"][-1][0] not in CHANGES_WIDTH or seen.linears > 0
    assert seen.worst <= 1, f"{seen.worst_call}: {seen.worst:.2f} of its bound"
    assert_same(model, answer, expected, x, after)
    if with_inductor:
        with checking(exact=True, inductor=True) as through:
            answer = run(model, compiled(model, program))
        assert through.worst <= 1, f"{through.worst_call}: {through.worst:.2f} of its bound"
        assert_same(model, answer, expected, x, after)
    return seen


@torch.no_grad()
def run(model, function):
    """The answer to a model's input, and what became of that."""
    model.reset()
    x = model.x.clone()
    return function(x), x


def compiled(model, program):
    torch._dynamo.reset()
    given = {name: program[name] for name in ("threshold", "decomposition")}
    return torch.compile(model, backend="llmint8", fullgraph=True, options=given)


def assert_same(model, answer, expected, x, after):
    """The answer is the float model's, and what was written is, too."""
    y, x_after = answer
    assert_same_form(y, expected)
    for value, wanted in ((y, expected), (x_after, x)):
        size = wanted.abs().max().clamp_min(1)
        assert (value - wanted).abs().max() <= ROUNDING[y.dtype] * size
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


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
