"""``options={"attention": True}``: products of two activations in int8."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx
from int8fx.kernels.ops.int8_matmul import int8_matmul
from int8fx.kernels.ops.quantize_reference import MAX_K, quantize_reference
from int8fx.testing.support import compile_once

ON = {"attention": True}


def bound(left, right):
    """Of the error, from the scales alone, with the rounding of the result to its dtype."""
    left_scale = quantize_reference(left, 0.0, "token")[1].double().unsqueeze(-1)
    right_scale = quantize_reference(right.mT, 0.0, "token")[1].double().unsqueeze(-2)
    K = left.shape[-1]
    a, b = left.double().abs().sum(-1, keepdim=True), right.double().abs().sum(-2, keepdim=True)
    half = 0.5001
    round_off = half * (left_scale * b + right_scale * a + half * K * left_scale * right_scale)
    return round_off + 2 * torch.finfo(left.dtype).eps * (left.double() @ right.double()).abs()


SHAPES = {
    "heads": ((2, 3, 5, 16), (2, 3, 16, 7)),
    "one query": ((2, 3, 1, 16), (2, 3, 16, 9)),
    "broadcast": ((2, 1, 5, 16), (3, 16, 4)),
    "plain": ((5, 3), (3, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_product_is_within_its_bound_and_its_integers_are_exact(shapes, dtype):
    torch.manual_seed(0)
    left, right = (torch.randn(shape, dtype=dtype) for shape in shapes)
    y = int8_matmul(left, right)
    expected = left.double() @ right.double()
    assert y.shape == expected.shape and y.dtype == dtype
    assert ((y.double() - expected).abs() <= bound(left, right)).all()
    left_int8, left_scale, _, _ = quantize_reference(left, 0.0, "token")
    right_int8, right_scale, _, _ = quantize_reference(right.mT, 0.0, "token")
    acc = left_int8.double() @ right_int8.double().mT
    exact = acc.float() * left_scale.unsqueeze(-1) * right_scale.unsqueeze(-2)
    assert torch.equal(y, exact.to(dtype))


def test_values_that_are_not_finite_stay_in_their_row_and_column():
    left, right = torch.randn(4, 8), torch.randn(8, 6)
    left[1, 2], right[3, 4] = torch.nan, torch.inf
    y = int8_matmul(left, right)
    spoilt = torch.zeros(4, 6, dtype=torch.bool)
    spoilt[1], spoilt[:, 4] = True, True
    assert torch.equal(~y.isfinite(), spoilt)


def test_nothing_to_sum_and_too_much():
    assert int8_matmul(torch.ones(2, 0), torch.ones(0, 3)).tolist() == [[0.0] * 3] * 2
    assert int8_matmul(torch.ones(0, 4, 2), torch.ones(0, 2, 3)).shape == (0, 4, 3)
    assert int8_matmul(torch.ones(1, MAX_K), torch.ones(MAX_K, 1)).item() == pytest.approx(MAX_K)
    with pytest.raises(ValueError, match=rf"int8_matmul: K = {MAX_K + 1} could overflow an int32 sum"):
        int8_matmul(torch.ones(1, MAX_K + 1), torch.ones(MAX_K + 1, 1))


def test_opcheck_and_gradients():
    left, right = torch.randn(2, 1, 5, 8), torch.randn(3, 8, 4)
    torch.library.opcheck(int8_matmul, (left.requires_grad_(), right.requires_grad_()))
    upstream = torch.randn(2, 3, 5, 4)
    got = torch.autograd.grad(int8_matmul(left, right), (left, right), upstream)
    expected = torch.autograd.grad(left @ right, (left, right), upstream)
    torch.testing.assert_close(got, expected)


class Attention(nn.Module):
    """Eager attention, whose output projection reads PV at once: a candidate reads a candidate."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.fused = fused

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            return self.o(F.scaled_dot_product_attention(q, k, v))
        p = torch.softmax(q @ k.mT / 4, -1)
        return self.o(torch.matmul(p, v))


@pytest.fixture
def x():
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


def test_off_by_default_and_on_when_asked(x):
    torch.manual_seed(0)
    model = Attention().requires_grad_(False)
    expected = model(x)
    off, without = compile_once(model, x)
    on, report = compile_once(model, x, backend_options=ON)
    reasons = [decision.reason for decision in without.refused]
    assert reasons == ["both operands are activations"] * 2
    assert len(report.accepted) == 6 and not report.refused
    assert report.graph.count("int8fx.int8_matmul.default") == 2
    assert not torch.equal(on, off)
    assert (on - expected).norm() / expected.norm() < 0.05


def test_fused_attention_says_why_and_what_to_do(x):
    model = Attention(fused=True).requires_grad_(False)
    _, report = compile_once(model, x, backend_options=ON)
    (refused,) = report.refused
    assert refused.spelling == "torch.nn.functional.scaled_dot_product_attention"
    assert 'load the model with attn_implementation="eager"' in refused.reason


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (torch.ones(3), torch.ones(3, 2), "two activations that are no matrices"),
        (torch.ones(2, 3).double(), torch.ones(3, 2).double(), "a product of torch.float64"),
        (torch.ones(1, MAX_K + 1), torch.ones(MAX_K + 1, 1), "could overflow an int32 sum"),
    ],
    ids=["vector", "float64", "huge K"],
)
def test_what_is_left_in_float_and_why(left, right, reason):
    def product(left, right):
        return left @ right

    y, report = compile_once(product, left, right, backend_options=ON)
    (refused,) = report.refused
    assert reason in refused.reason
    torch.testing.assert_close(y, left @ right)


def test_explain_shows_them(x):
    found = int8fx.explain(Attention().requires_grad_(False), x, options=ON)
    products = [row for row in found.rows if row.spelling in ("@", "torch.matmul")]
    assert [row.scheme for row in products] == ["absmax-vector"] * 2
    assert all(row.accepted and row.flops for row in products)
    assert "absmax-vector" in str(found)
