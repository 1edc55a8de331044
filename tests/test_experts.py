"""Mixtures of experts: the operator, the spellings, and blocks of transformers' models."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx
from int8fx.kernels import table
from int8fx.kernels.ops.expert_linear import expert_linear, routed_rows, rows_of_experts
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.passes.int8.serve_experts import serve_experts
from int8fx.testing.bounds import expected_and_bound
from int8fx.testing.checked import checking
from int8fx.testing.support import assert_close_to_float64, compile_once
from int8fx.testing.toy_models import build

E, N, K, S = 4, 24, 40, 9


@pytest.fixture
def weight():
    return torch.randn(E, N, K, generator=torch.Generator().manual_seed(0)) * 0.2


@pytest.fixture
def x():
    x = torch.randn(S, K, generator=torch.Generator().manual_seed(1))
    x[2, 7], x[5, 3] = 30.0, -12.0
    return x


SORTED = [0, 0, 0, 1, 1, 3, 3, 3, 3]
MIXED = [3, 0, 0, 1, 3, 0, 1, 3, 2]


# --- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [SORTED, MIXED, [2] * S], ids=["sorted", "mixed", "one"])
@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_each_row_meets_its_experts_matrix(weight, x, experts, decomposition, threshold):
    w_int8, w_scale = quantize_weight(weight)
    experts = torch.tensor(experts)
    y = expert_linear(x, threshold, decomposition, table.pack(w_int8), w_scale, experts)
    for expert in range(E):
        rows = experts == expert
        expected, bound = expected_and_bound(x[rows], weight[expert], None, threshold, decomposition)
        assert ((y[rows].double() - expected).abs() <= bound).all()


def test_a_negative_expert_counts_from_the_end_and_one_past_it_is_none(weight, x):
    w_int8, w_scale = quantize_weight(weight)
    packed = table.pack(w_int8)
    y = expert_linear(x, 6.0, "token", packed, w_scale, torch.tensor([-1, 0, E, -4, 1, E, 2, 3, 0]))
    same = expert_linear(x, 6.0, "token", packed, w_scale, torch.tensor([3, 0, 0, 0, 1, 0, 2, 3, 0]))
    none = torch.tensor([2, 5])
    assert not y[none].any()
    kept = [row for row in range(S) if row not in none]
    assert torch.equal(y[kept], same[kept])


@pytest.mark.parametrize("wrong", [E + 1, -E - 1])
def test_an_expert_that_is_not_there_is_named(wrong):
    with pytest.raises(IndexError, match=rf"expert {wrong} of 4: allowed are -4 to 3, and 4 for none"):
        list(rows_of_experts(torch.tensor([0, wrong]), E))


def test_sorted_rows_need_only_their_ends(weight, x):
    w_int8, w_scale = quantize_weight(weight)
    packed = table.pack(w_int8)
    ends = torch.tensor([3, 5, 5, 8], dtype=torch.int32)
    y = expert_linear(x, 6.0, "column", packed, w_scale, None, ends)
    experts = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, E])
    assert torch.equal(y, expert_linear(x, 6.0, "column", packed, w_scale, experts))
    with pytest.raises(ValueError, match="either their experts or, sorted, the ends"):
        expert_linear(x, 6.0, "column", packed, w_scale, None)


@pytest.mark.parametrize(
    ("experts", "ends", "message"),
    [
        (None, None, "either their experts or"),
        ([0, 1], [1, 2, 2], "either their experts or"),
        (None, [1, 2], r"ends has the shape \[2\]; for 3 experts it has to be \[3\]"),
    ],
)
def test_rows_have_one_routing(experts, ends, message):
    tensors = [None if each is None else torch.tensor(each) for each in (experts, ends)]
    with pytest.raises(ValueError, match=message):
        routed_rows(*tensors, 3)


def test_rows_in_order_are_slices_and_no_copies():
    assert list(rows_of_experts(torch.tensor(SORTED), E)) == [
        (0, slice(0, 3)),
        (1, slice(3, 5)),
        (3, slice(5, 9)),
    ]
    assert list(rows_of_experts(torch.empty(0, dtype=torch.int64), E)) == []


def test_opcheck(weight, x):
    w_int8, w_scale = quantize_weight(weight)
    args = (x.requires_grad_(), 6.0, "column", table.pack(w_int8), w_scale, torch.tensor(MIXED))
    torch.library.opcheck(expert_linear, args)


def test_the_gradient_is_that_of_the_int8_weights(weight, x):
    w_int8, w_scale = quantize_weight(weight)
    experts = torch.tensor(MIXED)
    upstream = torch.randn(S, N)
    y = expert_linear(x.requires_grad_(), 6.0, "column", table.pack(w_int8), w_scale, experts)
    y.backward(upstream)
    w_hat = w_int8.double() * w_scale.double().unsqueeze(-1)
    expected = torch.einsum("sn,snk->sk", upstream.double(), w_hat[experts])
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


# --- spellings ------------------------------------------------------------------------------------


def ends(experts):
    return torch.searchsorted(experts, torch.arange(E), right=True).to(torch.int32)


def indexed(x, w, experts):
    return torch.bmm(w[experts], x.unsqueeze(-1)).squeeze(-1)


# name: (function of x, weight and experts; what brings [E, N, K] to the weight's order; experts)
SPELLINGS = {
    "bmm(w[i], x)": (indexed, (0, 1, 2), MIXED),
    "bmm(x, w[i])": (lambda x, w, i: torch.bmm(x.unsqueeze(1), w[i]).squeeze(1), (0, 2, 1), MIXED),
    "x @ w[i]": (lambda x, w, i: (x.unsqueeze(1) @ w[i]).squeeze(1), (0, 2, 1), MIXED),
    "x @ index_select": (
        lambda x, w, i: (x.unsqueeze(1) @ w.index_select(0, i)).squeeze(1),
        (0, 2, 1),
        MIXED,
    ),
    "two rows for each index": (
        lambda x, w, i: (x[:8].view(4, 2, K) @ w[i[:8:2]].mT).view(8, N),
        (0, 1, 2),
        [3, 3, 0, 0, 1, 1, 3, 3, 0],
    ),
    "bmm of every expert": (
        lambda x, w, i: torch.bmm(x[:8].view(E, 2, K), w).view(8, N),
        (0, 2, 1),
        [0, 0, 1, 1, 2, 2, 3, 3, 0],
    ),
    "bmm of every expert, weight first": (
        lambda x, w, i: torch.bmm(w, x[:8].view(E, 2, K).mT).mT.reshape(8, N),
        (0, 1, 2),
        [0, 0, 1, 1, 2, 2, 3, 3, 0],
    ),
    "baddbmm": (
        lambda x, w, i: (
            torch.baddbmm(i[:8].view(E, 2, 1) * 0.5, x[:8].view(E, 2, K), w).view(8, N)
            - i[:8, None] * 0.5
        ),
        (0, 2, 1),
        [0, 0, 1, 1, 2, 2, 3, 3, 0],
    ),
    "transformers' fallback": (
        lambda x, w, i: torch.ops.transformers.grouped_mm_fallback(x, w.mT, offs=ends(i)),
        (0, 1, 2),
        SORTED,
    ),
    "grouped_mm": (
        lambda x, w, i: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=ends(i)),
        (0, 2, 1),
        SORTED,
    ),
}


class Spelled(nn.Module):
    def __init__(self, function, weight):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(weight.contiguous())

    def forward(self, x, experts):
        return self.function(x, self.weight, experts)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_rewritten_and_within_the_bound(name, weight, x):
    import transformers.integrations.moe  # noqa: F401  (registers the fallback)

    function, permutation, experts = SPELLINGS[name]
    model = Spelled(function, weight.permute(permutation))
    torch._dynamo.reset()
    experts = torch.tensor(experts)
    with checking() as seen, torch.no_grad(), int8fx.collect_reports() as reports:
        y = torch.compile(model, backend="llmint8", fullgraph=True)(x, experts)
    (decision,) = reports[0].decisions
    assert decision.accepted, decision.reason
    assert (decision.experts, decision.shape) == (E, (N, K))
    assert "[E=4, N=24, K=40]" in str(decision)
    assert seen.linears == E and seen.worst <= 1, seen
    rows = len(y)
    expected = torch.einsum("sk,snk->sn", x[:rows].double(), weight.double()[experts[:rows]])
    assert_close_to_float64(y, expected, K)


NO_ROWS = {
    "bmm of every expert": (lambda x, w, i: torch.bmm(x[:0].view(E, 0, K), w), (0, 2, 1)),
    "weight first": (lambda x, w, i: torch.bmm(w, x[:0].view(E, K, 0)), (0, 1, 2)),
    "bmm(x, w[i])": (lambda x, w, i: torch.bmm(x[:0].view(S, 0, K), w[i]), (0, 2, 1)),
    "no index": (lambda x, w, i: torch.bmm(x[:0].unsqueeze(1), w[i[:0]]), (0, 2, 1)),
    "transformers' fallback": (
        lambda x, w, i: torch.ops.transformers.grouped_mm_fallback(x[:0], w.mT, offs=ends(i[:0])),
        (0, 1, 2),
    ),
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_no_rows_are_no_rows(name, weight, x):
    import transformers.integrations.moe  # noqa: F401  (registers the fallback)

    function, permutation = NO_ROWS[name]
    model = Spelled(function, weight.permute(permutation))
    y, report = compile_once(model, x, torch.tensor(MIXED))
    assert report.decisions[0].accepted, report.decisions[0].reason
    assert (y.shape, y.dtype) == (model(x, torch.tensor(MIXED)).shape, x.dtype)


def test_compiled_with_inductor_and_any_number_of_rows(weight, x):
    torch._dynamo.reset()
    model = Spelled(indexed, weight)
    compiled = torch.compile(model, backend="llmint8", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (S, 5, 2):
            experts = torch.tensor(MIXED[:rows])
            expected = torch.einsum("sk,snk->sn", x[:rows].double(), weight.double()[experts])
            assert_close_to_float64(compiled(x[:rows], experts), expected, K)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, i: F.grouped_mm(x.bfloat16(), (w * 2).bfloat16(), offs=ends(i)), "an activation"),
        (lambda x, w, i: torch.matmul(x.view(3, 1, 3, K), w), "a batch of matrices"),
    ],
    ids=["computed weight", "broadcast batches"],
)
def test_what_is_no_expert_product_is_refused(function, reason, weight, x):
    model = Spelled(function, weight.transpose(1, 2))
    torch._dynamo.reset()
    with checking() as seen, torch.no_grad(), int8fx.collect_reports() as reports:
        y = torch.compile(model, backend="llmint8", fullgraph=True)(x, torch.tensor(SORTED))
    assert reason in reports[0].decisions[0].reason
    assert seen.linears == 0
    torch.testing.assert_close(y, model(x, torch.tensor(SORTED)))


def test_a_device_may_have_an_operator_of_its_own(x):
    """Which takes the place of ours, with its arguments."""
    graph = torch.fx.Graph()
    arguments = [graph.placeholder(name) for name in ("x", "w", "w_scale", "experts")]
    arguments[0].meta["example_value"] = x
    call = graph.call_function(expert_linear, (arguments[0], 6.0, "column", *arguments[1:], None))
    graph.output(call)
    assert serve_experts(graph, lambda device: None) == 0
    assert call.target is expert_linear
    assert serve_experts(graph, {"cpu": torch.add}.get) == 1
    assert call.target is torch.add and call.args[1:3] == (6.0, "column")


@pytest.mark.parametrize(("name", "is_sorted"), [("grouped_mm", True), ("bmm(w[i], x)", False)])
def test_grouped_rows_bring_their_ends_and_others_their_experts(name, is_sorted, weight, x):
    function, permutation, experts = SPELLINGS[name]
    model = Spelled(function, weight.permute(permutation))
    with checking():
        _, report = compile_once(model, x, torch.tensor(experts))
    (line,) = [each for each in report.graph.splitlines() if "int8fx.expert_linear" in each]
    experts_and_ends = re.search(r"\w+_scale, (\w+), (\w+)\)", line).groups()
    assert [name == "None" for name in experts_and_ends] == [is_sorted, not is_sorted]


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_experts_of_a_model_are_quantised(model_type, implementation):
    toy = build(model_type)
    toy.model.set_experts_implementation(implementation)
    torch._dynamo.reset()
    with checking() as seen, torch.no_grad(), int8fx.collect_reports() as reports:
        torch.compile(toy.model, backend="llmint8", fullgraph=True)(**toy.inputs)
    experts = [decision for decision in reports[0].decisions if decision.experts]
    assert {decision.path.split(".")[-1] for decision in experts} == {"gate_up_proj", "down_proj"}
    assert all(decision.accepted for decision in experts)
    assert seen.worst <= 1, seen.worst_call


def test_a_mixture_of_experts_compiles_in_bf16(weight):
    toy = build("mixtral")
    model = toy.model.bfloat16()
    with torch.no_grad():
        expected = model(**toy.inputs).logits
    y, report = compile_once(Logits(model), toy.inputs["input_ids"])
    assert sum(bool(decision.experts) and decision.accepted for decision in report.decisions) == 2
    assert (y - expected).norm() / expected.norm() < 0.05


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids).logits
