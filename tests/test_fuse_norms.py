"""fuse_norms: which spellings are norms, which norms move, and that the result is the same."""

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from int8fx.testing.support import context_of

pytest.importorskip("triton")

import int8fx
from int8fx.kernels import table
from int8fx.kernels.gpu.norm import norm_statistics, normalized_reference
from int8fx.passes.contract import Result
from int8fx.passes.int8.fuse_norms import (
    FEW,
    NO_OUTLIERS,
    ON_THE_WAY,
    READ_ELSEWHERE,
    SUM_IN_FP32,
    SUM_ON_THE_WAY,
    WRITTEN,
    fuse_norms,
)
from int8fx.passes.outcome import Outcome

M, K, N = 20, 8, 4
_library = torch.library.Library("int8fx_test_norms", "DEF")
_READS = "float threshold, str decomposition, Tensor[] weights, Tensor[] w_scales, Tensor[] biases"
_NORM = "Tensor x, Tensor? addend, str norm, Tensor norm_weight, Tensor? norm_bias, float eps"
_library.define(f"linears(Tensor x, {_READS}) -> Tensor[]")
_library.define(f"normed({_NORM}, {_READS}) -> Tensor[]")
linears = torch.ops.int8fx_test_norms.linears.default
normed = torch.ops.int8fx_test_norms.normed.default


@torch.library.impl(_library, "linears", "CompositeExplicitAutograd")
def _linears(x, threshold, decomposition, weights, w_scales, biases) -> list[Tensor]:
    return [x @ weight.t() for weight in weights]


@torch.library.impl(_library, "normed", "CompositeExplicitAutograd")
def _normed(x, addend, norm, norm_weight, norm_bias, eps, *read) -> list[Tensor]:
    total = x.clone() if addend is None else x + addend
    h = normalized_reference(total, *norm_statistics(total, norm, eps), norm_weight, norm_bias, norm)
    outputs = _linears(h, *read)
    return outputs if addend is None else [*outputs, total]


def _shapes(x, w_scales) -> list[Tensor]:
    """A weight may be packed: its scales tell N."""
    return [x.new_empty(*x.shape[:-1], len(w_scale)) for w_scale in w_scales]


@torch.library.register_fake("int8fx_test_norms::linears", lib=_library)
def _(x, threshold, decomposition, weights, w_scales, biases) -> list[Tensor]:
    return _shapes(x, w_scales)


@torch.library.register_fake("int8fx_test_norms::normed", lib=_library)
def _(x, addend, norm, norm_weight, norm_bias, eps, *read) -> list[Tensor]:
    return _shapes(x, read[3]) + ([] if addend is None else [torch.empty_like(x)])


class Base(nn.Module):
    """Parameters of a norm, and linears of whatever a subclass makes of x."""

    threshold, decomposition = 6.0, "column"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.rand(K, generator=generator).half())
        self.bias = nn.Parameter(torch.rand(K, generator=generator).half())
        self.linear = nn.Parameter(torch.rand(N, K, generator=generator).half())
        self.scale = nn.Parameter(torch.ones(N))

    def read(self, h: Tensor, count: int = 1) -> list[Tensor]:
        given = [self.linear] * count, [self.scale] * count, []
        return linears(h, self.threshold, self.decomposition, *given)

    def mean_square(self, x: Tensor) -> Tensor:
        return x.pow(2).mean(-1, keepdim=True)

    def llama(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        return self.weight * (x32 * torch.rsqrt(self.mean_square(x32) + 1e-5)).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor):
        return self.read(self.llama(x))[0]


class T5(Base):
    def forward(self, x, y):
        h = x * torch.rsqrt(self.mean_square(x.to(torch.float32)) + 1e-5)
        return self.read(self.weight * h.to(self.weight.dtype))[0]


class Olmo(Base):
    def forward(self, x, y):
        x32 = x.float()
        h = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + 1e-5)
        return self.read((self.weight * h).to(x.dtype))[0]


class OneCall(Base):
    def forward(self, x, y):
        return self.read(F.rms_norm(x, (K,), self.weight))[0]


class Layer(Base):
    def forward(self, x, y):
        return self.read(F.layer_norm(x, (K,), self.weight, self.bias, 1e-5))[0]


class LayerWithoutBias(Base):
    def forward(self, x, y):
        return self.read(F.layer_norm(x, (K,), self.weight, eps=1e-5))[0]


class Viewed(Base):
    """GPT-2's: linears of rows, whatever there were before."""

    def forward(self, x, y):
        h = F.layer_norm(x, (K,), self.weight, self.bias, 1e-5)
        return self.read(h.view(-1, K))[0].view(*x.shape[:-1], N)


class Residual(Base):
    """The sum is read before the linears, and after them."""

    def forward(self, x, y):
        total = x + y
        early = total * 2
        q, k = self.read(self.llama(total), 2)
        return early, q, k, total + 1


class Dropped(Base):
    def forward(self, x, y):
        total = F.dropout(y, 0.1, False) + x
        return self.read(self.llama(total))[0], total


class Vllm(Base):
    """The first of a model; every cast is there, whether it does something or not."""

    def vllm(self, x32: Tensor) -> Tensor:
        weight = self.weight.data
        h = x32 * torch.rsqrt(self.mean_square(x32) + 1e-5)
        return (h.to(weight.dtype) * weight).to(torch.float16)

    def forward(self, x, y):
        return self.read(self.vllm(x.to(torch.float32)))[0]


class VllmResidual(Vllm):
    """All others: what is normalised is the sum before it is rounded."""

    def forward(self, x, y):
        total = x.to(torch.float32) + y.to(torch.float32)
        residual = total.to(torch.float16)
        return self.read(self.vllm(total))[0], residual


MOVED = {
    Base: ("rms, rounded", False),
    T5: ("rms, rounded", False),
    Olmo: ("rms", False),
    OneCall: ("rms", False),
    Layer: ("layer, bias", False),
    LayerWithoutBias: ("layer", False),
    Viewed: ("layer, bias", False),
    Residual: ("rms, rounded", True),
    Dropped: ("rms, rounded", True),
    Vllm: ("rms, rounded", False),
}


class ReadTwice(Base):
    def forward(self, x, y):
        h = self.llama(x)
        return self.read(h)[0], h.sum(-1)


class WithoutOutliers(Base):
    threshold = 0.0


class Everything(Base):
    decomposition = "all"


class NotRounded(Base):
    """The result is in fp32, and is rounded to what a linear reads after it."""

    def forward(self, x, y):
        x32 = x.float()
        h = self.weight * (x32 * torch.rsqrt(self.mean_square(x32) + 1e-5))
        return self.read(h.bfloat16().half())[0]


class OverRows(Base):
    def mean_square(self, x):
        return x.pow(2).mean(-2, keepdim=True)


class Cubed(Base):
    def mean_square(self, x):
        return x.pow(3).mean(-1, keepdim=True)


class OfAnother(Base):
    """The mean square of something else."""

    def forward(self, x, y):
        x32, y32 = x.float(), y.float()
        h = (x32 * torch.rsqrt(self.mean_square(y32) + 1e-5)).to(x.dtype)
        return self.read(self.weight * h)[0]


class Gemma(Base):
    """The weight is computed, in a kernel that would be one more."""

    def forward(self, x, y):
        return self.read(F.rms_norm(x, (K,), 1.0 + self.weight, 1e-5))[0]


class Computed(Base):
    """Nobody needs what is normalised: Inductor computes it on the way."""

    def forward(self, x, y):
        return self.read(self.llama(torch.sigmoid(x)))[0]


class SumOfComputed(Base):
    def forward(self, x, y):
        total = x + torch.sigmoid(y)
        return self.read(self.llama(total))[0], total


class DroppedSum(Base):
    """GPT-2's first: with positions, before a dropout."""

    def forward(self, x, y):
        total = F.dropout(x + torch.sigmoid(y), 0.1, False)
        return self.read(self.llama(total))[0], total


class Broadcast(Base):
    def forward(self, x, y):
        total = x + self.bias
        return self.read(self.llama(total))[0], total


class Overwritten(Base):
    def forward(self, x, y):
        h = self.llama(x)
        x.mul_(2)
        return self.read(h)[0]


class TwoDimensions(Base):
    def forward(self, x, y):
        weight = self.weight.expand(M, K)
        return self.read(F.layer_norm(x, (M, K), weight))[0]


COMPUTED_WEIGHT = "the norm's weight or bias is computed in the graph"
LEFT = {
    ReadTwice: READ_ELSEWHERE,
    WithoutOutliers: NO_OUTLIERS,
    Everything: NO_OUTLIERS,
    NotRounded: "the norm is rounded twice",
    OverRows: "the norm's mean is not over the last dimension",
    Cubed: "the norm's mean is not of squares",
    OfAnother: "the norm divides by the mean square of another value",
    Gemma: COMPUTED_WEIGHT,
    Computed: ON_THE_WAY,
    SumOfComputed: SUM_ON_THE_WAY,
    VllmResidual: SUM_IN_FP32,
    DroppedSum: SUM_ON_THE_WAY,
    Broadcast: SUM_ON_THE_WAY,
    Overwritten: WRITTEN,
    TwoDimensions: "the norm is over several dimensions",
}


def captured(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    graphs = []

    def keep(gm: fx.GraphModule, examples: list[Tensor]):
        graphs.append((gm, examples))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


def rows(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, K, generator=generator).half() for _ in range(2))


def fuse(gm: fx.GraphModule) -> Result:
    values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    (mode, *_) = [value.fake_mode for value in values if isinstance(value, Tensor)]
    context = context_of(
        gm.graph,
        mode,
        devices=("cpu",),
        joined={"cpu": (linears, 3)}.get,
        normed={"cpu": normed}.get,
    )
    result = fuse_norms(gm.graph, context)
    gm.graph.lint()
    gm.recompile()
    return result


def same(left: object, right: object) -> bool:
    pairs = zip(left, right, strict=True) if isinstance(left, tuple | list) else [(left, right)]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", MOVED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("lead", [(M,), (2, M)], ids=str)
def test_a_norm_moves_and_the_result_is_the_same(kind, lead):
    gm, examples = captured(kind(), *rows(lead))
    with torch.no_grad():
        before = gm(*examples)
        assert fuse(gm) == Result(1)
        assert same(gm(*examples), before)
    (call,) = gm.graph.find_nodes(op="call_function", target=normed)
    x, addend, norm, weight, bias, eps, threshold, *_ = call.args
    assert (norm, addend is not None) == MOVED[kind]
    assert weight.op == "placeholder" and threshold == 6.0
    assert eps == (torch.finfo(torch.float32).eps if kind is OneCall else 1e-5)
    assert (bias is not None) == norm.endswith("bias")
    assert not gm.graph.find_nodes(op="call_function", target=linears)
    assert not gm.graph.find_nodes(op="call_function", target=torch.rsqrt)  # nothing computes it twice
    if addend is None:
        assert x.op == "placeholder"


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_a_norm_is_left_to_inductor(kind):
    model = kind()
    gm, _ = captured(model, *rows((M,)))
    printed = str(gm.graph)
    assert fuse(gm) == Result(0, Counter({LEFT[kind]: 1}))
    assert str(gm.graph) == printed


def test_few_rows_are_left_and_an_unknown_number_moves():
    for lead, dynamic, moved in (
        ((16,), False, 0),
        ((2, 8), False, 0),
        ((17,), False, 1),
        ((4,), True, 1),
    ):
        inputs = rows(lead)
        if dynamic:
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 0)
        gm, _ = captured(Base(), *inputs)
        assert fuse(gm) == Result(moved, Counter({FEW: 1} if moved == 0 else {})), lead


def test_results_that_nothing_reads_are_no_obstacle():
    class OnlyTheSecond(Base):
        def forward(self, x, y):
            return self.read(self.llama(x), 2)[1]

    gm, examples = captured(OnlyTheSecond(), *rows((M,)))
    with torch.no_grad():
        before = gm(*examples)
        assert fuse(gm) == Result(1)
        assert same(gm(*examples), before)
    (read,) = gm.graph.find_nodes(op="call_function", target=operator.getitem)
    assert read.args[1] == 1


class Normalised(nn.Module):
    """Two norms of Llama's kind; the second is a result of the model as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.RMSNorm(32), nn.RMSNorm(32)
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        h = self.second(self.up(self.first(x)))
        return self.down(h), h


def test_explain_says_why_a_norm_is_not_fused(monkeypatch):
    model, x = Normalised().requires_grad_(False), torch.randn(20, 32)
    shown = int8fx.explain(model, x)
    (outcome,) = [each for each in shown.passes if each.name == "fuse_norms"]
    assert outcome.skipped == "no operator of cpu takes a norm and its linears"
    assert outcome.skipped.split()[-1] in str(shown)

    monkeypatch.setattr(table, "normed", lambda device: normed)
    shown = int8fx.explain(model, x)
    (outcome,) = [each for each in shown.passes if each.name == "fuse_norms"]
    assert outcome == Outcome("fuse_norms", 1, {READ_ELSEWHERE: 1})
    (line,) = [line for line in str(shown).splitlines() if line.startswith("fuse_norms")]
    assert line.split() == ["fuse_norms", "1", "1", "left:", *READ_ELSEWHERE.split()]
    assert f'<td class="note">1 left: {READ_ELSEWHERE}</td>' in shown._repr_html_()
    (written,) = [each for each in shown.to_dict()["passes"] if each["name"] == "fuse_norms"]
    assert written["refused"] == {READ_ELSEWHERE: 1}
