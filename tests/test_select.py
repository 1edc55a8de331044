"""select: one table of rules; the first that objects refuses, with a reason."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int8fx.passes.linears.select import (
    LEAST_K,
    RULES,
    WRITTEN,
    columns_reason,
    only_reason,
    size_reason,
    skip_reason,
)
from int8fx.testing.support import compile_once, interpreted, reports_of

K, N = 32, 24


class Linear(nn.Module):
    """``product`` of x and a parameter ``[N, K]``, in a module of this path: ``inner``."""

    def __init__(self, product=F.linear, weight=None):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(K, N, bias=False).requires_grad_(False)
        if weight is not None:
            self.inner.weight = nn.Parameter(weight, requires_grad=False)
        self.product = product

    def forward(self, x):
        return self.product(x, self.inner.weight)


def reason_of(model, x=None, **options) -> str:
    x = torch.randn(3, K) if x is None else x
    (report,) = reports_of(lambda: interpreted(model, **options)(x))
    (decision,) = report.decisions
    assert decision.accepted is (decision.reason == "")
    assert decision.scheme == ("llm.int8" if decision.accepted else "")
    return decision.reason


def test_what_no_rule_objects_to_is_accepted():
    assert reason_of(Linear()) == ""


def write_to_the_weight(x, w):
    y = F.linear(x, w)
    w.add_(1)
    return y


def write_to_a_copy(x, w):
    copied = w.t().contiguous()
    copied.add_(1)
    return x @ copied


REFUSED = {
    "skip": ({}, {"skip": ["inn*"]}, "skip: matches 'inn*'"),
    "only": ({}, {"only": ["outer"]}, "only: matches none of its patterns"),
    "written": ({"product": write_to_the_weight}, {}, WRITTEN),
    "a copy": ({"product": write_to_a_copy}, {}, "the graph writes to a copy of this weight"),
    "few columns": (
        {"weight": torch.randn(N, LEAST_K - 1)},
        {},
        f"K = {LEAST_K - 1} is below {LEAST_K}",
    ),
    "dtype": (
        {"weight": torch.randn(N, K, dtype=torch.float64)},
        {},
        "weight of torch.float64: int8 takes the place of fp32, bf16 and fp16 only",
    ),
    "skip first": (
        {"weight": torch.randn(N, LEAST_K - 1)},
        {"skip": ["inner"]},
        "skip: matches 'inner'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_first_rule_that_objects_gives_the_reason(name):
    given, options, reason = REFUSED[name]
    model = Linear(**given)
    weight = model.inner.weight
    x = torch.randn(3, weight.shape[1], dtype=weight.dtype)
    assert reason_of(model, x, **options).startswith(reason)


def test_the_rules_are_one_table_of_named_functions():
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


def test_a_tied_head_stays_and_is_called_by_its_own_path():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(N, K)
            self.head = nn.Linear(K, N, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model, ids = Tied().requires_grad_(False), torch.arange(5)
    (report,) = reports_of(lambda: interpreted(model)(ids))
    (decision,) = report.decisions
    assert decision.path == "head"
    assert decision.reason == "skip: the output head (its weight is also an embedding)"
    (report,) = reports_of(lambda: interpreted(model, skip=[])(ids))
    assert report.decisions[0].accepted


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (torch.randn(4, K), torch.randn(K, 4), ""),
        (torch.randn(4, K).double(), torch.randn(K, 4).double(), "a product of torch.float64"),
    ],
    ids=["matrices", "float64"],
)
def test_products_of_two_activations_are_asked_for(left, right, reason):
    def product(left, right):
        return left @ right

    (report,) = reports_of(lambda: interpreted(product, attention=True)(left, right))
    (decision,) = report.decisions
    assert decision.reason.startswith(reason) and decision.accepted is (not reason)
    (report,) = reports_of(lambda: interpreted(product)(left, right))
    assert report.decisions[0].reason == "both operands are activations"


@pytest.mark.parametrize(
    ("path", "skip", "only", "reasons"),
    [
        ("a.b", ("a.*",), None, ("skip: matches 'a.*'", "")),
        ("a.b", ("b", "*.b"), ("a.?",), ("skip: matches '*.b'", "")),
        ("a.b", (), ("b",), ("", "only: matches none of its patterns")),
        ("A.b", ("a.b",), (), ("", "only: matches none of its patterns")),
    ],
)
def test_patterns(path, skip, only, reasons):
    assert (skip_reason(path, skip), only_reason(path, only)) == reasons


@pytest.mark.parametrize(
    ("shape", "rank", "reason"),
    [
        ((N, K), 2, ""),
        ((2, N, K), 3, ""),
        ((2, N, K), 2, "the weight has shape [2, 24, 32]"),
        ((0, K), 2, "the weight has shape [0, 32]"),
        ((K,), 2, "the weight has shape [32]"),
        ((N, 133145), 2, "K = 133145 could overflow an int32 sum (at most 133144)"),
    ],
)
def test_sizes(shape, rank, reason):
    assert size_reason(shape, rank) == reason


def test_few_columns_that_are_named_are_quantised():
    assert columns_reason(LEAST_K, None) == columns_reason(1, ("inner",)) == ""
    assert columns_reason(LEAST_K - 1, None).startswith(f"K = {LEAST_K - 1} is below {LEAST_K}")
    model = Linear(weight=torch.randn(N, LEAST_K - 1))
    assert reason_of(model, torch.randn(3, LEAST_K - 1), only=["inner"]) == ""


def _decorated(forward):
    """As transformers does where an argument has another name than it had."""

    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight

    @_decorated
    def forward(self, ids):
        return self.head(self.embed(ids))


def test_a_tied_head_has_its_own_path_however_its_model_is_called():
    _, report = compile_once(
        TiedHead().requires_grad_(False), torch.arange(6), backend_options={"skip": ["head"]}
    )
    assert [(each.path, each.reason) for each in report.decisions] == [("head", "skip: matches 'head'")]
