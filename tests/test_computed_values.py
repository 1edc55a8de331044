"""Views of an int8 weight that have no int8 form: read as the float values, and never written to."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx

N, K = 48, 32

VIEWS = {
    "a row": lambda w: w[0],
    "a column": lambda w: w[:, 1],
    "every other row": lambda w: w[::2],
    "of three dimensions": lambda w: w.view(4, N // 4, K),
    "reshaped": lambda w: w.reshape(N, 4, K // 4),
    "unbound": lambda w: w.unbind(0)[3],
    "unsqueezed": lambda w: w.unsqueeze(0),
    "the diagonal": lambda w: w.diagonal(),
    "expanded": lambda w: w.expand(2, -1, -1),
    "flat, of a part": lambda w: w.view(-1)[3:9],
    "of a view": lambda w: w.unsqueeze(0)[0].t()[2],
    "bits": lambda w: w.view(torch.int32),
}
WRITES = {
    "in place": lambda view: view.mul_(2),
    "zero_": lambda view: view.zero_(),
    "setitem": lambda view: view.__setitem__(0, 1),
    "out=": lambda view: torch.neg(view.clone(), out=view),
    "foreach": lambda view: torch._foreach_mul_([view], 2),
    "init": lambda view: nn.init.ones_(view),
    "numpy": lambda view: view.numpy().fill(0),
    "data": lambda view: view.data.mul_(2),
    "detach": lambda view: view.detach().mul_(2),
    "dlpack": lambda view: torch.from_dlpack(view).mul_(2),
}


def weight() -> int8fx.Int8Weight:
    torch.manual_seed(0)
    return int8fx.quantize_(nn.Linear(K, N)).weight


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_a_write_to_a_view_is_refused(view, write):
    w = weight()
    before = w.dequantize()
    with pytest.raises(RuntimeError, match="read-only"):
        write(view(w))
    assert torch.equal(w.dequantize(), before)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_reads_as_the_float_values(view):
    w = weight()
    got, expected = view(w.detach()), view(w.dequantize())
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(got, expected)
    for same in (got.clone(), copy.deepcopy(got), pickle.loads(pickle.dumps(got)), got + 0):
        assert type(same) is torch.Tensor and torch.equal(same, expected)
    assert np.array_equal(np.asarray(got), expected.numpy()) and got.tolist() == expected.tolist()
    assert np.array_equal(got.numpy(force=True), expected.numpy())
    assert torch.equal(torch.from_dlpack(got.__dlpack__(copy=True)), expected)
    assert repr(got) == repr(expected)


def test_a_copy_of_a_view_is_the_users_own():
    w = weight()
    row = w[0].clone()
    row.zero_()
    assert not row.any() and w[0].any()


def test_gradients_flow_through_products_with_a_view():
    w, x = weight(), torch.randn(4, K, requires_grad=True)
    heads = w.view(4, N // 4, K)
    torch.einsum("mk,hnk->hmn", x, heads).sum().backward()
    (expected,) = torch.autograd.grad((x @ w.dequantize().t()).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "llmint8"])
def test_a_view_in_a_compiled_function(backend):
    torch._dynamo.reset()
    w, x = weight(), torch.randn(4, K)
    row = w[3]

    def function(x, w, row):
        return F.linear(x, w.view(4, N // 4, K)[1]) * (x @ row).unsqueeze(1)

    with torch.no_grad():
        expected = function(x, w.dequantize(), row.clone())
        y = torch.compile(function, backend=backend)(x, w, row)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
