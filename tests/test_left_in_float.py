"""What int8 would not serve stays in float: what was not learned, few columns, and low-rank factors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx
from int8fx.passes.linears.select import LOW_RANK
from int8fx.testing.support import compile_once

OWNERLESS = "a buffer that no linear layer owns: it was computed, not learned"


def reasons_of(model, *args, **options):
    torch.manual_seed(0)
    _, report = compile_once(model.requires_grad_(False), *args, backend_options=options)
    return {decision.path: decision.reason for decision in report.decisions}


# --- what was not learned ------------------------------------------------------------------------


class LogMel(nn.Module):
    """A spectrogram's powers, over twelve decades, through a filter bank of triangles."""

    def __init__(self):
        super().__init__()
        centres, bins = torch.linspace(4, 190, 20), torch.arange(201.0)
        triangles = (1 - (bins.unsqueeze(1) - centres).abs() / 9).clamp(min=0)
        self.register_buffer("mel_filters", triangles)

    def forward(self, powers):
        return (powers @ self.mel_filters).clamp(min=1e-12).log10()


def test_a_log_mel_front_end_keeps_its_decades():
    powers = torch.logspace(2, -10, 201).expand(3, -1).contiguous()
    model = LogMel()
    y, report = compile_once(model, powers)
    torch.testing.assert_close(y, model.double()(powers.double()).float(), rtol=0, atol=1e-3)
    (decision,) = report.decisions
    assert decision.reason.startswith(OWNERLESS)


MATRICES = {
    "x @ m": lambda x, m: x @ m,
    "linear": lambda x, m: F.linear(x, m.t()),
    "einsum": lambda x, m: torch.einsum("bk,kn->bn", x, m),
    "from the left": lambda x, m: (m.t() @ x.mT).mT,
    "a view of it": lambda x, m: x @ m[:, 4:20].float(),
}


class Transforms(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.register_buffer("basis", torch.randn(32, 24), persistent=False)
        self.product = product

    def forward(self, x):
        return self.product(x, self.basis)


@pytest.mark.parametrize("product", MATRICES.values(), ids=MATRICES)
def test_a_buffer_that_no_linear_owns_stays_unless_it_is_named(product):
    x = torch.randn(4, 32)
    (reason,) = reasons_of(Transforms(product), x).values()
    assert reason.startswith(OWNERLESS) and "`only`" in reason
    assert reasons_of(Transforms(product), x, only=["basis"]) == {"basis": ""}


class FrozenLinear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.randn(out_features, in_features))

    def forward(self, x):
        return F.linear(x, self.weight)


class AnnotatedLinear(nn.Module):
    in_features: int

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return F.linear(x, self.weight)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(24, 32)


LINEARS = {
    "nn.Linear": lambda: nn.Linear(32, 24),
    "Conv1D": conv1d,
    "a class of one's own": lambda: FrozenLinear(32, 24),
    "an annotated class": lambda: AnnotatedLinear(torch.randn(24, 32)),
}


@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
def test_a_buffer_that_is_a_linears_weight_is_a_weight(make):
    linear = make().requires_grad_(False)
    weight = linear.weight.data
    if "weight" in linear._parameters:
        del linear.weight
        linear.register_buffer("weight", weight)
    model = nn.Sequential(nn.ReLU(), linear)
    assert reasons_of(model, torch.randn(4, 32)) == {"1": ""}


# --- few columns ---------------------------------------------------------------------------------


class Routed(nn.Module):
    def __init__(self, K):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 24, K))

    def forward(self, x):
        return torch.bmm(x, self.experts.mT)


@pytest.mark.parametrize(("K", "few"), [(1, True), (15, True), (16, False)])
def test_few_columns_stay_unless_they_are_named(K, few):
    for model, x in ((nn.Linear(K, 24), torch.randn(4, K)), (Routed(K), torch.randn(3, 4, K))):
        (reason,) = reasons_of(model, x).values()
        assert reason.startswith(f"K = {K} is below 16") == few
        assert list(reasons_of(model, x, only=["*"]).values()) == [""]


def test_quantize_leaves_few_columns_as_the_backend_does():
    model = nn.ModuleDict({"few": nn.Linear(15, 24), "enough": nn.Linear(16, 24)})
    reasons = {decision.path: decision.reason for decision in int8fx.decisions(model)}
    assert reasons["few"].startswith("K = 15 is below 16") and reasons["enough"] == ""
    assert not any(decision.reason for decision in int8fx.decisions(model, only=["*"]))


def test_what_is_in_int8_already_stays_in_int8():
    linear = int8fx.quantize_(nn.Linear(8, 24), only=["*"])
    x = torch.randn(4, 8)
    y, report = compile_once(linear, x)
    assert report.accepted and torch.equal(y, linear(x))


# --- low-rank factors ----------------------------------------------------------------------------

K, N, R = 64, 96, 8


class Adapted(nn.Module):
    """A linear with a low-rank path beside it, and what is between its factors."""

    def __init__(self, between, r=R):
        super().__init__()
        self.base, self.between = nn.Linear(K, N), between
        self.down, self.up = nn.Linear(K, r, bias=False), nn.Linear(r, N, bias=False)
        self.inner, self.scale = nn.LayerNorm(r), nn.Parameter(torch.rand(r) + 0.5)

    def forward(self, x):
        return self.base(x) + self.up(self.between(self, self.down(x))) * 2.0


KEPT = {
    "nothing": lambda self, h: h,
    "a scale": lambda self, h: 0.5 * h / 3,
    "a dropout": lambda self, h: F.dropout(h, 0.1, self.training),
    "a learned scale": lambda self, h: h * self.scale,
    "a cast and a view": lambda self, h: h.float().view(-1, R).contiguous(),
}
NOT_KEPT = {
    "a norm": lambda self, h: self.inner(h),
    "a function": lambda self, h: F.silu(h),
    "a gate": lambda self, h: h * h.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("between", KEPT.values(), ids=KEPT)
def test_low_rank_factors_stay_in_float(between):
    x = torch.randn(4, K)
    reasons = reasons_of(Adapted(between).eval(), x)
    assert reasons == {"base": "", "down": LOW_RANK, "up": LOW_RANK}


@pytest.mark.parametrize("between", NOT_KEPT.values(), ids=NOT_KEPT)
def test_two_linears_with_a_function_between_them_are_no_factors(between):
    reasons = reasons_of(Adapted(between, r=16), torch.randn(4, K))
    assert reasons == dict.fromkeys(("base", "down", "up"), "")


@pytest.mark.parametrize(("r", "low"), [(32, True), (33, False)])
def test_a_rank_is_low_up_to_half_of_either_side(r, low):
    reasons = reasons_of(Adapted(KEPT["nothing"], r=r), torch.randn(4, K))
    assert (reasons["down"] == LOW_RANK) == (reasons["up"] == LOW_RANK) == low


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.relu, lambda h: h.tanh() * 2])
@pytest.mark.parametrize(("r", "low"), [(8, True), (9, False)])
def test_a_bottleneck_around_a_function_is_an_adapters_up_to_an_eighth(function, r, low):
    reasons = reasons_of(Adapted(lambda self, h: function(h), r=r), torch.randn(4, K))
    assert reasons["down"] == (LOW_RANK if low else "")
    assert reasons["up"].startswith(LOW_RANK if low else "K = 9 is below 16")


def test_ranks_above_128_are_worth_it():
    wide = nn.Sequential(nn.Linear(512, 129), nn.Linear(129, 512))
    narrow = nn.Sequential(nn.Linear(512, 128), nn.Linear(128, 512))
    assert reasons_of(wide, torch.randn(4, 512)) == {"0": "", "1": ""}
    assert reasons_of(narrow, torch.randn(4, 512)) == {"0": LOW_RANK, "1": LOW_RANK}


FACTORS = {
    "x @ a @ b": lambda x, a, b: x @ a @ b,
    "linears": lambda x, a, b: F.linear(F.linear(x, a.t()), b.t()),
    "columns": lambda x, a, b: (b.t() @ (a.t() @ x.mT)).mT,
}


@pytest.mark.parametrize("product", FACTORS.values(), ids=FACTORS)
def test_factors_in_every_spelling(product):
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(K, R)), nn.Parameter(torch.randn(R, N))

        def forward(self, x):
            return product(x, self.a, self.b)

    assert reasons_of(Factors(), torch.randn(4, K)) == {"a": LOW_RANK, "b": LOW_RANK}


class Grouped(nn.Module):
    """Attention with one key head, whose projections are as narrow as a factor's."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(256, 256), nn.Linear(256, 32), nn.Linear(256, 32)
        self.o, self.score = nn.Linear(256, 256), nn.Linear(256, 3)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (8, 32)).transpose(1, 2)
        k, v = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.score(self.o(y.transpose(1, 2).flatten(-2)))


def test_narrow_projections_are_no_factors():
    assert not any(reasons_of(Grouped(), torch.randn(2, 5, 256)).values())
    assert not any(decision.reason for decision in int8fx.decisions(Grouped()))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def with_lora(model, r=4):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=r, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("r", [4, 32])
def test_an_adapter_evaluates_as_it_trains(r):
    """With and without gradients it is one function, and one that an optimizer changes."""
    torch.manual_seed(0)
    model = with_lora(Mlp(), r)
    x = torch.randn(6, K)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8")
    with pytest.warns(UserWarning, match="left 4 linears in float"):
        training = compiled(x)
    with torch.no_grad(), int8fx.collect_reports() as reports:
        evaluation = compiled(x)
    assert torch.equal(training, evaluation)
    reasons = {decision.path: decision.reason for decision in reports[0].decisions}
    assert {reason for path, reason in reasons.items() if "lora_" in path} == {LOW_RANK}
    assert {reason for path, reason in reasons.items() if "lora_" not in path} == {""}
    training.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained, lr=0.1, fused=True).step()
    with torch.no_grad():
        assert not torch.equal(compiled(x), evaluation)
    assert torch.equal(compiled(x), compiled(x).detach())


def test_quantize_leaves_adapters_as_the_backend_does():
    model = with_lora(Mlp())
    reasons = {
        decision.path.split("model.model.")[1]: decision.reason for decision in int8fx.decisions(model)
    }
    assert reasons == {
        f"{linear}.{part}": reason
        for linear in ("up", "down")
        for part, reason in (
            ("base_layer", ""),
            ("lora_A.default", LOW_RANK),
            ("lora_B.default", LOW_RANK),
        )
    }
    int8fx.quantize_(model)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_quantize_knows_factors_by_the_linears_beside_them():
    chain = nn.Sequential(nn.Linear(K, 16), nn.Dropout(0.1), nn.Linear(16, N))
    for model in (Adapted(KEPT["nothing"], r=16), chain):
        of_backend = reasons_of(copy.deepcopy(model).eval(), torch.randn(4, K))
        assert LOW_RANK in of_backend.values()
        assert {d.path: d.reason for d in int8fx.decisions(model)} == of_backend
    bottleneck = nn.Sequential(nn.Linear(160, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 160))
    of_backend = reasons_of(copy.deepcopy(bottleneck).eval(), torch.randn(4, 160))
    assert of_backend == {"0": LOW_RANK, "3": LOW_RANK}
    assert {d.path: d.reason for d in int8fx.decisions(bottleneck)} == of_backend
    others = (
        nn.Sequential(nn.Linear(K, 16), nn.ReLU(), nn.Linear(16, N)),
        nn.Sequential(nn.Linear(K, 16), nn.LayerNorm(16), nn.Linear(16, N)),
        Mlp(),
    )
    assert not any(decision.reason for model in others for decision in int8fx.decisions(model))
