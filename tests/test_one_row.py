"""A float linear of one row becomes a sum: where, and that it is the product."""

import pytest
import torch
from torch import nn

from int8fx.passes.float.one_row import DTYPE, ROWS, SMALL
from int8fx.testing.support import compile_once, outcome_of

K, N = 32, 40


class Head(nn.Module):
    """A linear in int8, whose output the head reads; ``lm_head`` is skipped by name."""

    def __init__(self, bias):
        super().__init__()
        self.body = nn.Linear(K, K)
        self.lm_head = nn.Linear(K, N, bias=bias)

    def forward(self, x):
        hidden = self.body(x)
        return hidden, self.lm_head(hidden)


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr("int8fx.passes.float.one_row.LEAST_BYTES", 0)


def run(*shape, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    model = Head(bias).to(dtype).requires_grad_(False)
    (hidden, y), report = compile_once(model, torch.randn(*shape, K, dtype=dtype), dynamic=False)
    head = model.lm_head.double()
    return y, head(hidden.double()), report.graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_is_a_sum(dtype, bias):
    y, expected, graph = run(1, 1, dtype=dtype, bias=bias)
    assert ".sum(-1)" in graph and graph.count("int8fx.once") == 1  # not computed for each output
    assert y.shape == (1, 1, N)
    # Sums of K products and a bias in fp32, then one rounding.
    error = (y.double() - expected).abs()
    assert y.dtype == dtype
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


def test_more_rows_and_small_weights_are_products(monkeypatch):
    assert ".sum(-1)" not in run(2, 1)[2]
    monkeypatch.setattr("int8fx.passes.float.one_row.LEAST_BYTES", 4 << 20)
    assert ".sum(-1)" not in run(1, 1)[2]


def test_under_autocast_it_stays():
    model = Head(True).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        (_, y), report = compile_once(model, torch.randn(1, K), dynamic=False)
    assert y.dtype == torch.bfloat16
    assert ".sum(-1)" not in report.graph


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 1), torch.float32, ROWS),
        ((0,), torch.float32, ROWS),
        ((1,), torch.float64, DTYPE),
    ],
    ids=["two rows", "no rows", "float64"],
)
def test_a_product_stays_for_a_reason(shape, dtype, reason):
    class Apart(nn.Module):
        """An int8 linear beside the head, which reads another input."""

        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Linear(K, K), nn.Linear(K, N, dtype=dtype)

        def forward(self, x, h):
            return self.body(x), self.lm_head(h)

    h = torch.randn(*shape, K, dtype=dtype)
    _, report = compile_once(Apart().requires_grad_(False), torch.randn(3, K), h, dynamic=False)
    outcome = outcome_of(report, "one_row")
    assert (outcome.changed, outcome.refused) == (0, {reason: 1})


def test_a_small_weight_is_a_reason(monkeypatch):
    monkeypatch.setattr("int8fx.passes.float.one_row.LEAST_BYTES", 4 << 20)
    model = Head(True).requires_grad_(False)
    _, report = compile_once(model, torch.randn(1, K), dynamic=False)
    assert outcome_of(report, "one_row").refused == {SMALL: 1}
