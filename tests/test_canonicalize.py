"""Every spelling of a linear map is found, rewritten and computes the same."""

import operator
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import int8fx
from int8fx.testing.support import assert_close_to_float64, compile_once

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

    def forward(self, *inputs):
        # As a list: Dynamo of torch 2.11 unpacks no ParameterList.
        return self.function(*inputs, *list(self.weights))


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
    "einsum, then a view that eager's strides allow": (
        lambda x, w: torch.einsum("sbk,nk->bns", x, w).transpose(1, 2).view(B, -1),
        [(N, K)],
        (S, B, K),
    ),
    "x @ a batch of one": (lambda x, w: x @ w.unsqueeze(0), [(K, N)], (S, K)),
    "x @ w[None]": (lambda x, w: x @ w[None], [(K, N)], (B, S, K)),
    "x @ a parameter that is a batch of one": (lambda x, w: x @ w, [(1, K, N)], (B, S, K)),
    "x @ an expanded weight": (lambda x, w: x @ w.expand(4, -1, -1), [(K, N)], (S, K)),
    "x @ a repeated weight": (lambda x, w: x @ w.repeat(4, 1, 1), [(K, N)], (S, K)),
    "x @ an expanded weight, turned": (lambda x, w: x @ w.expand(4, -1, -1).mT, [(N, K)], (S, K)),
    "a batch of one @ an expanded weight": (lambda x, w: x @ w.expand(4, -1, -1), [(K, N)], (1, S, K)),
    "a vector @ an expanded weight": (lambda x, w: x @ w.expand(4, -1, -1), [(K, N)], (K,)),
    "an expanded weight @ x": (lambda x, w: w.expand(4, -1, -1) @ x, [(N, K)], (K, S)),
    "an expanded weight @ a vector": (lambda x, w: w.expand(4, -1, -1) @ x, [(N, K)], (K,)),
    "an expanded x": (lambda x, w: x.expand(4, -1, -1) @ w, [(K, N)], (S, K)),
    "an unsqueezed x": (lambda x, w: x.unsqueeze(0) @ w, [(K, N)], (S, K)),
    "@=": (lambda x, w: operator.imatmul(x, w), [(K, N)], (B, S, K)),
    "Tensor.__rmatmul__": (lambda x, w: w.__rmatmul__(x), [(K, N)], (B, S, K)),
    "a weight moved to x's device": (lambda x, w: F.linear(x, w.to(x.device)), [(N, K)], (B, S, K)),
    "a weight moved to a device by name": (lambda x, w: F.linear(x, w.to("cpu")), [(N, K)], (B, S, K)),
    "a weight moved by keyword": (
        lambda x, w: F.linear(x, w.to(device=x.device, dtype=x.dtype)),
        [(N, K)],
        (B, S, K),
    ),
    "a weight moved and cast": (
        lambda x, w: F.linear(x, w.to(x.device, x.dtype)),
        [(N, K)],
        (B, S, K),
    ),
    "a transposed weight moved": (lambda x, w: x @ w.t().to(x.device), [(N, K)], (B, S, K)),
    "torch.addmm of a column": (
        lambda x, w, b: torch.addmm(b, flat(x), w),
        [(K, N), (B * S, 1)],
        (B, S, K),
    ),
    "torch.addbmm": (
        lambda x, w, b: torch.addbmm(b, x, w),
        [(B, K, N), (S, N)],
        (B, S, K),
    ),
    "torch.mv": (lambda x, w: torch.mv(w, x), [(N, K)], (K,)),
    "Tensor.mv": (lambda x, w: w.mv(x), [(N, K)], (K,)),
    "torch.addmv": (lambda x, w, b: torch.addmv(b, w, x), [(N, K), (N,)], (K,)),
    "Tensor.addmv": (lambda x, w, b: b.addmv(w, x), [(N, K), (1,)], (K,)),
    "torch.inner": (torch.inner, [(N, K)], (B, S, K)),
    "torch.tensordot": (lambda x, w: torch.tensordot(x, w, 1), [(K, N)], (B, S, K)),
    "torch.tensordot of two dimensions": (
        lambda x, w: torch.tensordot(x, w, ([-2, -1], [1, 2])),
        [(N, 4, K // 4)],
        (B, S, 4, K // 4),
    ),
    "torch.linalg.multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w]), [(K, N)], (S, K)),
    "torch.chain_matmul": (torch.chain_matmul, [(K, N)], (S, K)),
    "F.conv1d of one point": (F.conv1d, [(N, K, 1)], (B, K, S)),
    "F.conv2d of one point": (F.conv2d, [(N, K, 1, 1), (N,)], (B, K, S, 4)),
    "F.conv3d of one point": (
        lambda x, w: F.conv3d(x, w, padding="same", dilation=2),
        [(N, K, 1, 1, 1)],
        (B, K, S, 4, 5),
    ),
    "F.conv2d of one point, without a batch": (F.conv2d, [(N, K, 1, 1)], (K, S, 4)),
    "aten.mm": (lambda x, w: torch.ops.aten.mm.default(self=flat(x), mat2=w), [(K, N)], (B, S, K)),
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
    "moved to where x is": (lambda x, w: F.linear(x, w.to(x)), [(N, K)], "is an activation"),
    "of x's type": (lambda x, w: F.linear(x, w.type_as(x)), [(N, K)], "is an activation"),
    "moved to the CPU": (lambda x, w: F.linear(x, w.cpu()), [(N, K)], "cpu of weights.0"),
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
    "a contracted index that broadcasts": (
        lambda x, w: torch.einsum("bsk,kn->bsn", x, w),
        [(1, N)],
        r"broadcasts a contracted index: \['k'\]",
    ),
    "a contracted index of x that broadcasts": (
        lambda x, w: torch.einsum("bsk,kn->bsn", x[..., :1], w),
        [(K, N)],
        r"broadcasts a contracted index: \['k'\]",
    ),
    "an old signature": (
        lambda x, w: torch.addmm(1, flat(x), 1, flat(x), w),
        [(K, K)],
        "called as no linear map: too many positional arguments",
    ),
    "a bias that has more dimensions than the result": (
        lambda x, w, b: F.linear(x[0, 0], w, b),
        [(N, K), (1, N)],
        r"its linear form has the shape \[1, 40\], and its result \[40\]",
    ),
    "addmm_": (
        lambda x, w: x.new_ones(B * S, N).addmm_(flat(x), w),
        [(K, N)],
        "it writes its result into its first argument",
    ),
    "baddbmm_": (
        lambda x, w: x.new_ones(B, S, N).baddbmm_(x, w),
        [(B, K, N)],
        "it writes its result into its first argument",
    ),
    "F.bilinear": (
        lambda x, w: F.bilinear(x, x, w),
        [(N, K, K)],
        "a product of two activations and a weight",
    ),
    "a cell of a recurrent network": (
        lambda x, w, v: torch.gru_cell(x[:, 0], x.new_ones(B, N), w, v),
        [(3 * N, K), (3 * N, N)],
        "inside one fused call",
    ),
    "a chain": (
        lambda x, v, w: torch.linalg.multi_dot([flat(x), v, w]),
        [(K, N), (N, K)],
        "a chain of 3 matrices",
    ),
    "a convolution with a stride": (
        lambda x, w: F.conv1d(x.mT, w, stride=2),
        [(N, K, 1)],
        "a convolution with stride 2",
    ),
    "a padded convolution": (
        lambda x, w: F.conv1d(x.mT, w, padding=1),
        [(N, K, 1)],
        "a convolution with padding 1",
    ),
    "a convolution of groups": (
        lambda x, w: F.conv1d(x.mT, w, groups=K),
        [(K, 1, 1)],
        "a convolution of 24 groups",
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


# What picks rows by their values: how many there are is known at no time before.
LAID_OUT = {
    "w @ x": lambda x, w: (w @ x.t()).sum(1),
    "einsum, transposed": lambda x, w: torch.einsum("bk,nk->nb", x, w).t().reshape(-1).view(-1, N),
    "einsum, an order of its own": lambda x, w: torch.einsum("bkt,nk->tbn", x[..., None], w).sum(0),
    "conv1d": lambda x, w: F.conv1d(x[..., None], w[..., None]).view(-1, N),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_number_of_rows_that_depends_on_data(name):
    model = Spelled(lambda x, w: LAID_OUT[name](x[x[:, 0] > 0], w), (N, K))
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(torch._dynamo.config, "capture_dynamic_output_shape_ops", True):
        y, report = compile_once(model, x)
    assert [decision.reason for decision in report.decisions] == [""]
    assert_close_to_float64(y, model.double()(x.double()), K)


def test_both_weights_of_one_module_are_told_apart():
    linear = nn.Linear(K, N)
    _, report = compile_once(nn.Sequential(linear, nn.Linear(N, K)), torch.randn(S, K))
    assert [decision.path for decision in report.decisions] == ["0", "1"]
    assert [decision.shape for decision in report.decisions] == [(N, K), (K, N)]


OUT = {
    "mm": (torch.mm, (S, K), (K, N)),
    "matmul": (torch.matmul, (B, S, K), (K, N)),
    "bmm": (torch.bmm, (B, S, K), (B, K, N)),
    "mv": (lambda x, w, out: torch.mv(w, x, out=out), (K,), (N, K)),
    "inner": (torch.inner, (S, K), (N, K)),
    "tensordot": (lambda x, w, out: torch.tensordot(x, w, 1, out=out), (S, K), (K, N)),
    "tensordot, by position": (lambda x, w, out: torch.tensordot(x, w, 1, out), (S, K), (K, N)),
    "multi_dot": (lambda x, w, out: torch.linalg.multi_dot([x, w], out=out), (S, K), (K, N)),
    "addmm": (lambda x, w, out: torch.addmm(w[0], x, w, out=out), (S, K), (K, N)),
    "baddbmm": (lambda x, w, out: torch.baddbmm(w[0, 0], x, w, out=out), (B, S, K), (B, K, N)),
    "addbmm": (lambda x, w, out: torch.addbmm(w[0, 0], x, w, out=out), (B, S, K), (B, K, N)),
    "aten.mm": (torch.ops.aten.mm.out, (S, K), (K, N)),
}


@pytest.mark.parametrize("name", OUT)
def test_what_is_written_into_out_is_written(name):
    """The buffer is the caller's, who reads it; the linear behind it reads it as well."""
    function, x_shape, w_shape = OUT[name]
    model = Spelled(
        lambda x, out, w, v: (F.linear(function(x, w, out=out), v), out), w_shape, (K, N)
    ).requires_grad_(False)
    x = torch.randn(x_shape, generator=torch.Generator().manual_seed(1))
    expected = torch.empty(function(x, model.weights[0], out=torch.empty(0)).shape)
    y, _ = model(x, expected)
    out = torch.full_like(expected, 7.0)
    torch._dynamo.reset()
    with torch.no_grad(), int8fx.collect_reports() as reports:
        computed, returned = torch.compile(model, backend="llmint8", fullgraph=True)(x, out)
    reasons = [decision.reason for decision in reports[0].decisions]
    assert reasons == ["it writes its result into out=", ""]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(returned, expected)
    assert_close_to_float64(computed, y.double(), K)


class Queries(nn.Module):
    """``project`` on learned tokens, one for each of a batch."""

    def __init__(self, project):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 5, K))
        self.weight, self.project = nn.Parameter(torch.randn(N, K) * 0.2), project

    def forward(self, x):
        return x @ self.project(self.tokens.expand(x.shape[0], -1, -1), self.weight).mT


@pytest.mark.parametrize(
    "project",
    [
        F.linear,
        lambda tokens, w: tokens @ w.t(),
        lambda tokens, w: torch.einsum("btk,nk->btn", tokens, w),
    ],
    ids=["F.linear", "@", "einsum"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_learned_queries_are_an_input(project, dynamic):
    model = Queries(project).requires_grad_(False)
    x = torch.randn(B, S, N, generator=torch.Generator().manual_seed(1))
    y, report = compile_once(model, x, dynamic=dynamic)
    assert [(decision.path, decision.accepted) for decision in report.decisions] == [
        ("weight", True),
        (report.decisions[1].path, False),
    ]
    assert_close_to_float64(y, model.double()(x.double()), K)


def test_the_fused_layers_of_an_encoder_have_a_reason():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(K, 2, N, batch_first=True), 2)
    encoder.eval().requires_grad_(False)
    _, report = compile_once(encoder, torch.randn(B, S, K))
    assert [decision.spelling for decision in report.decisions] == [
        "torch._transformer_encoder_layer_fwd"
    ] * 2
    assert all("inside one fused call" in decision.reason for decision in report.decisions)
