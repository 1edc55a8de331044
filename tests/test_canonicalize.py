"""Every spelling of a linear map is found, rewritten and computes the same."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import assert_close_to_float64, compile_once
from torch import nn
from transformers.pytorch_utils import Conv1D

K, N, B, S = 24, 40, 2, 3


class Spelled(nn.Module):
    """A module that computes one linear map, spelled in one way."""

    def __init__(self, function, *shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator) * 0.2) for shape in shapes
        )

    def forward(self, x):
        return self.function(x, *self.weights)


def flat(x):
    return x.reshape(-1, x.shape[-1])


# name: (function of x and the weights, shapes of the weights, x's shape)
SPELLINGS = {
    "F.linear": (F.linear, [(N, K)], (B, S, K)),
    "F.linear with bias": (F.linear, [(N, K), (N,)], (B, S, K)),
    "F.linear, keyword arguments": (
        lambda x, w, b: F.linear(input=x, weight=w, bias=b),
        [(N, K), (N,)],
        (B, S, K),
    ),
    "F.linear of a vector": (F.linear, [(N, K), (N,)], (K,)),
    "F.linear of a transposed weight": (lambda x, w: F.linear(x, w.t()), [(K, N)], (B, S, K)),
    "F.linear of a slice": (lambda x, w: F.linear(x, w[:N]), [(3 * N, K)], (B, S, K)),
    "F.linear of a chunk": (
        lambda x, w: F.linear(x, w.chunk(3, 0)[1]),
        [(3 * N, K)],
        (B, S, K),
    ),
    "@": (lambda x, w: x @ w, [(K, N)], (B, S, K)),
    "@ and +": (lambda x, w, b: x @ w + b, [(K, N), (N,)], (B, S, K)),
    "@ of w.T": (lambda x, w: x @ w.T, [(N, K)], (B, S, K)),
    "@ of w.mT": (lambda x, w: x @ w.mT, [(N, K)], (B, S, K)),
    "@, four dimensions": (lambda x, w: x @ w, [(K, N)], (B, 5, S, K)),
    "@, a vector": (lambda x, w: x @ w, [(K, N)], (K,)),
    "w @ x": (lambda x, w: w @ x, [(N, K)], (B, K, S)),
    "w @ x, then view": (lambda x, w: (w @ x).view(B, -1), [(N, K)], (B, K, S)),
    "w @ a vector": (lambda x, w: w @ x, [(N, K)], (K,)),
    "torch.matmul": (torch.matmul, [(K, N)], (B, S, K)),
    "Tensor.matmul": (lambda x, w: x.matmul(w), [(K, N)], (B, S, K)),
    "torch.mm": (lambda x, w: torch.mm(flat(x), w), [(K, N)], (B, S, K)),
    "Tensor.mm": (lambda x, w: flat(x).mm(w), [(K, N)], (B, S, K)),
    "torch.addmm": (lambda x, w, b: torch.addmm(b, flat(x), w), [(K, N), (N,)], (B, S, K)),
    "Tensor.addmm": (lambda x, w, b: b.addmm(flat(x), w), [(K, N), (N,)], (B, S, K)),
    "torch.addmm of a matrix": (
        lambda x, w, b: torch.addmm(b, flat(x), w),
        [(K, N), (B * S, N)],
        (B, S, K),
    ),
    "torch.addmm of w @ x": (
        lambda x, w, b: torch.addmm(b, w, flat(x).t()),
        [(N, K), (B * S,)],
        (B, S, K),
    ),
    "torch.bmm, expanded weight": (
        lambda x, w: torch.bmm(x, w.expand(B, -1, -1)),
        [(K, N)],
        (B, S, K),
    ),
    "torch.baddbmm, expanded weight": (
        lambda x, w, b: torch.baddbmm(b, x, w.unsqueeze(0).expand(B, -1, -1)),
        [(K, N), (N,)],
        (B, S, K),
    ),
    "einsum, last index": (
        lambda x, w: torch.einsum("bsk,kn->bsn", x, w),
        [(K, N)],
        (B, S, K),
    ),
    "einsum, ellipsis": (lambda x, w: torch.einsum("...k,nk->...n", x, w), [(N, K)], (B, S, K)),
    "einsum, weight first": (
        lambda x, w: torch.einsum("nk,bsk->bsn", w, x),
        [(N, K)],
        (B, S, K),
    ),
    "einsum, implicit output": (lambda x, w: torch.einsum("sk,kt", x, w), [(K, N)], (S, K)),
    "einsum, heads": (
        lambda x, w: torch.einsum("bsk,hkd->bhsd", x, w),
        [(4, K, N // 4)],
        (B, S, K),
    ),
    "einsum, heads in": (
        lambda x, w: torch.einsum("bshd,hdn->bsn", x, w),
        [(4, K // 4, N)],
        (B, S, 4, K // 4),
    ),
    "Conv1D": (None, [], (B, S, K)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_rewritten_and_computes_the_same(name):
    function, shapes, x_shape = SPELLINGS[name]
    model = Conv1D(N, K) if function is None else Spelled(function, *shapes)
    x = torch.randn(x_shape, generator=torch.Generator().manual_seed(1))
    y, report = compile_once(model.eval(), x)
    assert [decision.reason for decision in report.decisions] == [""]
    expected = model.double()(x.double())
    assert y.shape == expected.shape
    assert y.stride() == model.float()(x).stride()
    assert_close_to_float64(y, expected, K)


REFUSED = {
    "activations": (lambda x, w: x @ x.mT + w.sum(), [(1,)], "both operands are activations"),
    "a sum of weights": (lambda x, v, w: F.linear(x, v + w), [(N, K)] * 2, "is an activation"),
    "weights": (lambda x, v, w: x[..., :1] * (v @ w).sum(), [(N, K), (K, N)], "both .* weights"),
    "a vector": (lambda x, w: x @ w, [(K,)], "the weight is a vector"),
    "a batch": (lambda x, w: x[:, None] @ w, [(B, K, N)], "the weight is a batch of matrices"),
    "alpha": (
        lambda x, w, b: torch.addmm(b, flat(x), w, alpha=2),
        [(K, N), (N,)],
        "beta=1 and alpha=2",
    ),
    "a diagonal": (
        lambda x, w: torch.einsum("bsk,kk->bsk", x, w),
        [(K, K)],
        "repeats an index",
    ),
    "a batched weight": (
        lambda x, w: torch.einsum("bsk,bkn->bsn", x, w),
        [(B, K, N)],
        "batched or summed alone",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_has_a_reason_and_runs_as_inductor(name):
    function, shapes, reason = REFUSED[name]
    model = Spelled(function, *shapes)
    x = torch.randn(B, S, K, generator=torch.Generator().manual_seed(1))
    y, report = compile_once(model, x)
    (decision,) = report.decisions
    assert not decision.accepted
    assert re.search(reason, decision.reason), decision.reason
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(y, torch.compile(model, backend="inductor")(x))


def test_both_weights_of_one_module_are_told_apart():
    linear = nn.Linear(K, N)
    _, report = compile_once(nn.Sequential(linear, nn.Linear(N, K)), torch.randn(S, K))
    assert [decision.path for decision in report.decisions] == ["0", "1"]
    assert [decision.shape for decision in report.decisions] == [(N, K), (K, N)]
