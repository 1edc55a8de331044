"""A random graph against the float model: every int8 linear inside its bound, nothing else moved."""

import copy

import torch

import int8fx
from int8fx.passes.linears.select import WRITTEN
from int8fx.testing.checked import checking
from int8fx.testing.random_graphs import LINEARS, REFUSED, WRITING_WEIGHTS, RandomModel

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
    expected_reasons = {reason for _, reason in REFUSED.values()}
    refused = {decision.reason for decision in decisions if not decision.accepted} - expected_reasons
    assert all(writes and reason.startswith(WRITTEN) for reason in refused), reports[0]
    assert writes or program["steps"][-1][0] not in LINEARS or seen.linears > 0
    assert seen.worst <= 1, f"{seen.worst_call}: {seen.worst:.2f} of its bound"
    assert_same(model, program, answer, (expected, x), after)
    if with_inductor:
        with checking(exact=True, inductor=True) as through:
            answer = run(model, compiled(model, program))
        assert through.worst <= 1, f"{through.worst_call}: {through.worst:.2f} of its bound"
        assert_same(model, program, answer, (expected, x), after)
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
    given["only"] = ["*"]  # by default few columns and low-rank factors stay in float
    return torch.compile(model, backend="llmint8", fullgraph=True, options=given)


def assert_same(model, program, answer, expected, after):
    """The answer is the float model's, and what was written is, too."""
    assert_same_form(answer[0], expected[0])
    for value, wanted in zip(answer, expected, strict=True):
        assert_close(value, wanted, program)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def assert_close(y, expected, program):
    rounded = program.get("autocast", "none") != "none"
    rounding = ROUNDING[torch.bfloat16 if rounded else y.dtype]
    size = expected.abs().amax().clamp_min(1) if expected.numel() else 1
    assert ((y - expected).abs() <= rounding * size).all()


def assert_same_form(y, expected):
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert y.isfinite().all() == expected.isfinite().all()
    assert y.is_contiguous() or not expected.is_contiguous()
