"""Random graphs against float64: every int8 linear inside the derived bound, and nothing else moved.

``python benchmarks/fuzz.py --graphs 2000`` runs more of the same.
"""

import pytest
from hypothesis import HealthCheck, given, settings

from int8fx.testing.fuzz import check
from int8fx.testing.random_graphs import programs

SETTINGS = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# What ``benchmarks/fuzz.py`` found, and was mended.
COUNTEREXAMPLES = [
    {  # three equal linears, which become one body that is called three times
        "shape": (1, 1, 1),
        "steps": [("convolution of one point", 0, index, 1, 0) for index in range(3)],
        "dtype": "float32",
        "threshold": 0.0,
        "decomposition": "column",
        "seed": 0,
        "autocast": "none",
    },
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
