"""However a weight changes, the next call computes with it: every way to change one times every kind.

What torch cannot know and no sample shows, a few elements of a large weight, is in test_refresh.py.
"""

import contextlib
import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import Mlp, assert_close_to_float64
from torch import Tensor, nn
from weight_changes import CHANGES, COUNTED, STEPS, UNCOUNTED

import int8fx
from int8fx import torch_private
from int8fx.weights import STORE

K, N, E, M = 64, 96, 4, 8


def interpreted(model, **options):
    """A compiled model whose rewritten graph runs operator by operator, under no_grad.

    Inductor would be all the time that the tests take.
    """

    def backend(gm, inputs):
        with mock.patch.object(torch_private, "compile_with_inductor", lambda gm, *rest: gm):
            return int8fx.llmint8(gm, inputs, options=options)

    return torch.no_grad()(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))


@dataclass(frozen=True)
class Kind:
    """A kind of weight: what is computed with it, and how it is made."""

    function: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...] = (N, K)
    dtype: torch.dtype = torch.float32
    made: Callable[[Tensor], Tensor] = lambda weight: weight
    writes: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    rounded: bool = False  # to bf16 on the way


def tied(x, w):
    return F.linear(x, w)[:, :K] + F.linear(2 * x, w)[:, K - N :].sum(-1, True) + F.pad(x, (0, N - K)) @ w


def in_bfloat16(x, w):
    if x.dtype is torch.float64:
        return F.linear(x, w)
    return F.linear(x.to(torch.bfloat16), w.to(torch.bfloat16)).to(x.dtype)


def routed(x, w):
    experts = torch.arange(M, device=x.device) % E
    return torch.bmm(w[experts], x.unsqueeze(-1)).squeeze(-1)


def in_a_buffer(weight):
    flat = torch.randn(100 + 2 * weight.numel()).to(weight.dtype)
    part = flat[100 : 100 + weight.numel()].view(weight.shape)
    return part.copy_(weight)


def with_gaps(weight):
    return torch.randn(weight.shape[0], 2 * weight.shape[1])[:, ::2].copy_(weight)


KINDS = {
    "float": Kind(F.linear),
    "bfloat16": Kind(F.linear, dtype=torch.bfloat16, rounded=True),
    "float16": Kind(F.linear, dtype=torch.float16, rounded=True),
    "tied": Kind(tied),
    "slice": Kind(lambda x, w: F.linear(x, w[16:80])),
    "transposed": Kind(lambda x, w: x @ w, shape=(K, N)),
    "cast": Kind(in_bfloat16, rounded=True),
    "experts": Kind(routed, shape=(E, N, K)),
    "small": Kind(F.linear, shape=(16, K)),
    "part of a buffer": Kind(F.linear, made=in_a_buffer),
    "laid out transposed": Kind(F.linear, made=lambda weight: weight.t().contiguous().t()),
    "with gaps": Kind(F.linear, made=with_gaps),
    "inference": Kind(F.linear, made=lambda weight: weight.clone(), writes=torch.inference_mode),
}


class Model(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(kind.made(torch.randn(kind.shape).to(kind.dtype)))

    def forward(self, x):
        return self.kind.function(x, self.weight)


def expected(model, x):
    with torch.no_grad():
        return model.kind.function(x.double(), model.weight.double())


def changed(model, x, change, call):
    """Changes a weight, by so much that the old one would be far outside of any bound."""
    before = expected(model, x)
    with model.kind.writes():
        change(model, call)
    assert (expected(model, x) - before).norm() > 0.5 * before.norm()


@pytest.fixture(scope="module", params=KINDS)
def compiled(request):
    """A model of a kind of weight, and compiled; the tests put a new weight in."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    kind = KINDS[request.param]
    with kind.writes():
        model = Model(kind)
    return model, interpreted(model)


# A tensor of inference mode cannot be given a gradient.
TRAINS = (STEPS.keys() | {"Adam"}) - {"fused Adam of another parameter"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(compiled, change):
    model, call = compiled
    kind = model.kind
    if kind is KINDS["inference"] and change in TRAINS:
        pytest.skip("an inference tensor cannot be trained")
    if kind is KINDS["laid out transposed"] and change == "vector_to_parameters":
        pytest.skip("torch refuses to view it")
    torch.manual_seed(1)
    x = torch.randn(M, K).to(kind.dtype)
    with kind.writes():
        model.weight = Model(kind).weight
        with int8fx.collect_reports() as reports:
            call(x)
    assert all(report.accepted for report in reports)
    changed(model, x, CHANGES[change], lambda: call(x))
    for _ in range(2):
        assert_close_to_float64(call(x), expected(model, x), K)
