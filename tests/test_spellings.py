"""Every row of SPELLINGS against eager, over shapes that broadcast, repeat and are empty.

What is rewritten is within its bound and of the same shape and dtype; what is not has a reason; what
eager refuses is an error. Only the rewriting runs, without Inductor (``checked.py``).
"""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers its fallback)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import int8fx
from int8fx.passes.linears.canonicalize import SPELLINGS
from int8fx.testing.checked import checking
from int8fx.testing.random_calls import GENERATORS, Spelled, generator

SETTINGS = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # what is drawn is small, and to shrink it takes many compiles
)
# What answers with float64's products is rounded, and summed with what is added; see test_fuzz.py.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.06}
TAKES_OUT = "matmul mm bmm addmm baddbmm addbmm mv inner tensordot multi_dot".split()


def attempt(model, *args, **named):
    """What a call answers with, or None and that it failed."""
    try:
        return model(*args, **named), False
    except Exception:
        return None, True


def check(key, call, dtype=torch.float32, autocast=False, out=False):
    """Compiles one call; returns its decisions.

    Raises:
        AssertionError: it computes something else than eager, or one of both fails.
    """
    model = Spelled(key, call, dtype, autocast)
    with torch.no_grad():
        expected, fails = attempt(model, *model.activations)
        buffers = {}
        if out and not fails:
            buffers = {"out": torch.full_like(expected, 7.0)}
            expected, fails = attempt(model, *model.activations, out=buffers["out"].clone())
        torch._dynamo.reset()
        # By default few columns stay in float.
        options = {"only": ["*"]}
        compiled = torch.compile(model, backend="llmint8", fullgraph=True, options=options)
        with checking(exact=True) as seen, int8fx.collect_reports() as reports:
            if fails:
                assert attempt(compiled, *model.activations, **buffers)[1], (
                    "eager fails, and it does not"
                )
                return ()
            y = compiled(*model.activations, **buffers)
    assert seen.worst <= 1, f"{seen.worst_call}: {seen.worst:.2f} of its bound"
    for ours, eagers in zip(*((y, expected) if out else ([y], [expected])), strict=True):
        assert_same(ours, eagers, torch.bfloat16 if autocast else eagers.dtype)
    decisions = reports[0].decisions if reports else ()
    assert all(decision.accepted or decision.reason for decision in decisions)
    return decisions


def assert_same(y, expected, precision):
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert not y.requires_grad
    if expected.numel():
        size = expected.abs().max().clamp_min(1)
        assert (y - expected).abs().max() <= ROUNDING[precision] * size


def test_every_spelling_has_a_generator_and_every_generator_a_spelling():
    assert {name.rpartition(".")[2] for name, _ in SPELLINGS.values()} == set(GENERATORS)


@pytest.mark.parametrize("key", SPELLINGS, ids=lambda key: SPELLINGS[key][0])
def test_any_shape(key):
    accepted = 0
    takes_out = callable(key) and SPELLINGS[key][0].rpartition(".")[2] in TAKES_OUT
    grouped = "grouped_mm" in SPELLINGS[key][0]
    vector = SPELLINGS[key][0].endswith("mv")  # fewer draws have the matrix as their weight

    @settings(SETTINGS, max_examples=(3 if vector else 1) * SETTINGS.max_examples)
    @given(st.data())
    def run(data):
        nonlocal accepted
        call = generator(key)(data.draw)
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
        autocast = not grouped and data.draw(st.integers(0, 5)) == 0
        out = takes_out and not autocast and data.draw(st.integers(0, 5)) == 0
        decisions = check(key, call, torch.bfloat16 if grouped else dtype, autocast, out)
        assert not out or not any(decision.accepted for decision in decisions)
        accepted += sum(decision.accepted for decision in decisions)

    run()
    assert accepted, "no call was rewritten"
