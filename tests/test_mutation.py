"""Graphs that write to weights, activations and what shares their memory: as eager mode has it."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import int8fx
from int8fx import torch_private
from int8fx.compiler import compilation
from int8fx.compiler.effects import Effects
from int8fx.passes.graph.mutation import Effect
from int8fx.passes.linears.select import WRITTEN
from int8fx.testing.checked import checking
from int8fx.testing.support import compile_once, memory_of

N, K, M = 16, 16, 5


class Model(nn.Module):
    """``function(x, model)``, with two linears' weights and biases, and a stack of experts."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight, self.other = (nn.Parameter(torch.randn(N, K) / 4) for _ in range(2))
        self.register_buffer("bias", torch.randn(N))
        self.register_buffer("other_bias", torch.randn(N))
        self.register_buffer("experts", torch.randn(3, N, K) / 4)
        self.register_buffer("index", torch.tensor([2, 0, 1, 1, 0]))
        self.requires_grad_(False)

    def forward(self, x):
        return self.function(x, self)


def rows():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


def assert_as_eager(model, calls=2):
    """Each call answers, and leaves behind, what eager mode does; linears answer in float64.

    Returns the decisions of the compile and how often an activation was quantised.
    """
    torch._dynamo.reset()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="llmint8", fullgraph=True)
    with torch.no_grad(), checking(exact=True) as seen, int8fx.collect_reports() as reports:
        for _ in range(calls):
            x, expected_x = rows(), rows()
            y, expected = compiled(x), eager(expected_x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(x, expected_x)
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))
    assert seen.worst <= 1
    (report,) = reports
    return report.decisions, report.quantizations


# --- weights --------------------------------------------------------------------------------------

# What writes to a tensor of two dimensions, without a name that says so, or through a view.
WRITES = {
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "foreach of data": lambda w: torch._foreach_mul_([w.data], 0.5),
    "out": lambda w: torch.mul(w, 0.5, out=w),
    "out, a tuple": lambda w: torch.topk(w, K, out=(w, torch.empty(N, K, dtype=torch.int64))),
    "out of a view": lambda w: torch.mul(w[1:], 0.5, out=w[1:]),
    "data.mul_": lambda w: w.data.mul_(0.5),
    "data.clamp_": lambda w: w.data.clamp_(-0.1, 0.1),
    "data =": lambda w: setattr(w, "data", w * 0.5),
    "relu": lambda w: F.relu(w, True),
    "leaky_relu": lambda w: F.leaky_relu(w, 0.1, True),
    "dropout": lambda w: F.dropout(w, 1.0, True, True),
    "embedding_bag": lambda w: F.embedding_bag(torch.arange(N)[None], w, max_norm=0.1),
    "batch norm": lambda w: F.batch_norm(torch.ones(2, K), w[0], w[1].abs_(), training=True),
    "setitem": lambda w: w.__setitem__((slice(1, 3), 0), 0.0),
    "index_put": lambda w: torch.index_put_(w, [torch.tensor([1])], torch.zeros(K)),
    "addmm_": lambda w: w.addmm_(w, w),
    "diagonal": lambda w: w.diagonal().zero_(),
    "as_strided": lambda w: w.as_strided((8,), (2,)).zero_(),
    "unfold": lambda w: w.unfold(0, 2, 2).mul_(0.5),
    "tensor_split": lambda w: w.tensor_split(3)[1].mul_(0.5),
    "hsplit": lambda w: w.hsplit(2)[0].mul_(0.5),
    "ravel": lambda w: w.ravel().mul_(0.5),
    "view_as": lambda w: w.view_as(torch.ones(K, N)).mul_(0.5),
    "expand_as": lambda w: w.expand_as(w).mul_(0.5),
    "broadcast_to": lambda w: torch.broadcast_to(w, (N, K)).mul_(0.5),
    "adjoint": lambda w: w.adjoint().mul_(0.5),
    "H": lambda w: w.H.mul_(0.5),
    "real": lambda w: w.real.mul_(0.5),
    "atleast_3d": lambda w: torch.atleast_3d(w).mul_(0.5),
    "type_as": lambda w: w.type_as(w).mul_(0.5),
    "contiguous": lambda w: w.contiguous().mul_(0.5),
    "meshgrid": lambda w: torch.meshgrid(w[0], indexing="ij")[0].mul_(0.5),
    "detach of a view of a view": lambda w: w.T.swapaxes(0, 1)[2:].detach().ravel().zero_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_weight_that_the_graph_writes_to_stays_in_float(name):
    def function(x, model):
        before = F.linear(x, model.weight)
        WRITES[name](model.weight)
        return before, F.linear(x, model.weight), F.linear(x, model.other)

    decisions, _ = assert_as_eager(Model(function))
    # What writes may be a product itself, as addmm_ is.
    linears = [each for each in decisions if each.spelling == "torch.nn.functional.linear"]
    assert [linear.reason for linear in linears] == [WRITTEN, WRITTEN, ""]


def test_an_embedding_that_is_renormalised_is_written_to_as_well():
    def function(x, model):
        F.embedding(model.index, model.weight, max_norm=0.1)
        return F.linear(x, model.weight)

    torch._dynamo.reset()
    model = Model(function)
    expected = copy.deepcopy(model)(rows())
    y, report = compile_once(model, rows(), backend_options={"skip": []})
    assert report.decisions[0].reason == WRITTEN
    torch.testing.assert_close(y, expected)


def of_one_parameter(model):
    flat = nn.Parameter(torch.randn(2 * N, K), requires_grad=False)
    model.weight, model.other = (nn.Parameter(half, requires_grad=False) for half in flat.split(N))


def overlapping_rows(model):
    model.weight.data = torch.randn(2 * N, K)
    model.other.data = model.weight.data[N // 2 : -N // 2]
    model.weight.data = model.weight.data[:N]


def transposed(model):
    model.other.data = model.weight.data.t()


def of_one_array(model):
    array = torch.randn(N, K).numpy()
    model.weight.data, model.other.data = torch.from_numpy(array), torch.from_numpy(array)
    storages = (each.untyped_storage()._cdata for each in (model.weight, model.other))
    assert len(set(storages)) == 2


@pytest.mark.parametrize("tie", [of_one_parameter, overlapping_rows, transposed, of_one_array])
def test_a_weight_that_shares_memory_with_what_is_written_stays_in_float(tie):
    def function(x, model):
        model.other.diagonal().mul_(0.5)
        return F.linear(x, model.weight)

    model = Model(function)
    tie(model)
    torch._dynamo.reset()
    expected = model(rows())
    tie(model := Model(function))
    y, report = compile_once(model, rows())
    assert report.decisions[0].reason == f"{WRITTEN}, or to other, which shares its memory"
    torch.testing.assert_close(y, expected)


def test_the_input_that_a_weight_lies_in_is_written_to():
    def function(x, model):
        y = F.linear(x[:M], model.weight)
        x.mul_(0.5)
        return y + F.linear(x[:M], model.weight)

    flat = torch.randn(N + M, K)
    model = Model(function)
    model.weight.data = flat[M:]
    before = flat.clone()
    y, report = compile_once(model, flat)
    assert report.decisions[0].reason == WRITTEN
    torch.testing.assert_close(y, 1.25 * before[:M] @ before[M:].t())


def after(write, value):
    write(value)
    return value


COPIES = {
    "a copy": lambda w: after(torch.relu_, w.clone()),
    "a copy of a copy": lambda w: after(torch.relu_, w.clone().t().contiguous()).t().contiguous(),
    "a cast": lambda w: after(lambda copy: F.relu(copy, True), w.to(torch.float64)).float(),
    "repeated": lambda w: after(lambda copy: F.relu(copy, True), w.t().repeat(2, 1, 1)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_weight_that_is_written_to_is_no_weight(name):
    def function(x, model):
        w = COPIES[name](model.weight)
        return torch.matmul(x.expand(2, M, K), w) if w.dim() == 3 else F.linear(x, w)

    decisions, _ = assert_as_eager(Model(function))
    assert decisions[0].reason == "the graph writes to a copy of this weight"


def test_a_weight_that_is_written_to_inside_a_body():
    def body(x, w):
        w.diagonal().mul_(0.5)
        return x + 1

    def function(x, model):
        x = checkpoint(body, x, model.weight, use_reentrant=False)
        return F.linear(x, model.weight)

    decisions, _ = assert_as_eager(Model(function))
    assert decisions[0].reason == WRITTEN


def test_a_body_that_writes_to_its_own_results_leaves_the_weight_alone():
    def function(x, model):
        def body(x, w):
            return F.relu(F.linear(x, w), True)

        return checkpoint(body, x, model.weight, use_reentrant=False)

    decisions, _ = assert_as_eager(Model(function))
    assert decisions[0].accepted


@pytest.mark.parametrize("write", ["mul_", "data"])
def test_a_weight_that_a_part_before_wrote_to(write):
    """It is another graph: the weight is seen to have changed when that one is called."""

    def function(x, model):
        (model.weight.data if write == "data" else model.weight).mul_(0.5)
        torch._dynamo.graph_break()
        return F.linear(x, model.weight)

    torch._dynamo.reset()
    model = Model(function)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="llmint8")
    with torch.no_grad():
        for _ in range(3):
            y, expected = compiled(rows()), eager(rows())
            assert (y - expected).norm() < 0.02 * expected.norm()


def test_what_cannot_be_run_may_write_to_anything(monkeypatch):
    def fails(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch_private, "fake_copy", fails)
    model = Model(lambda x, model: (F.leaky_relu(model.weight, 0.1), F.linear(x, model.weight))[1])
    y, report = compile_once(model, rows())
    reason = "leaky_relu may write to this weight: what it does is not known (RuntimeError: no kernel)"
    assert report.decisions[0].reason == reason
    torch.testing.assert_close(y, F.linear(rows(), model.weight))


# --- activations ----------------------------------------------------------------------------------

IN_PLACE = {
    "relu": lambda x: F.relu(x, True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1, True),
    "elu": lambda x: F.elu(x, 1.0, True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5, True),
    "threshold": lambda x: F.threshold(x, 0.2, 0.0, True),
    "dropout": lambda x: F.dropout(x, 1.0, True, True),
    "silu": lambda x: F.silu(x, inplace=True),
    "relu_": lambda x: torch.relu_(x),
    "foreach": lambda x: torch._foreach_mul_([x], 0.5),
    "out": lambda x: torch.mul(x, 0.5, out=x),
    "a view": lambda x: F.relu(x.unfold(0, 2, 1)[1:2].transpose(-1, -2), True),
    "data": lambda x: x.data.mul_(0.5),
    "into slices": lambda x: torch._foreach_copy_([x[:2]], [x[2:4]]),
}


@pytest.mark.parametrize("is_input", [True, False], ids=["an input", "a result"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_linears_of_an_activation_that_is_written_between_them(name, is_input):
    def function(x, model):
        x = x if is_input else x.clone()
        y = F.linear(x, model.weight)
        IN_PLACE[name](x)
        return y, F.linear(x, model.other)

    decisions, quantizations = assert_as_eager(Model(function))
    assert all(decision.accepted for decision in decisions)
    assert quantizations == 2


@pytest.mark.parametrize("name", IN_PLACE)
def test_linears_share_a_quantisation_where_something_else_is_written(name):
    def function(x, model):
        y = F.linear(x, model.weight)
        IN_PLACE[name](y)
        return y, F.linear(x, model.other)

    decisions, quantizations = assert_as_eager(Model(function))
    assert all(decision.accepted for decision in decisions)
    assert quantizations == 1


def test_a_bias_that_is_written_between_two_linears_of_one_activation():
    def function(x, model):
        y = F.linear(x, model.weight, model.bias)
        torch._foreach_mul_([model.other_bias], 0.5)
        return y, F.linear(x, model.other, model.other_bias)

    _, quantizations = assert_as_eager(Model(function))
    assert quantizations == 1


def test_a_bias_that_is_written_between_the_product_and_its_sum():
    def function(x, model):
        y = x @ model.weight
        model.bias.mul_(0.5)
        return y + model.other_bias

    model = Model(function)
    model.other_bias = model.bias.view(N)
    torch._dynamo.reset()
    expected = rows() @ model.weight + model.bias * 0.5
    with torch.no_grad(), checking(exact=True):
        y = torch.compile(model, backend="llmint8")(rows())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_experts_chosen_by_an_index_that_changes_before_the_product():
    def function(x, model):
        chosen = model.experts[model.index]
        model.index.zero_()
        return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)

    decisions, _ = assert_as_eager(Model(function))
    reason = decisions[0].reason
    assert reason.startswith("the graph writes to ")
    assert reason.endswith(" between a copy of it and the product")


def test_a_copy_of_an_activation_outlives_a_write():
    def function(x, model):
        copies = x.repeat(2, 1, 1)
        x.mul_(0.5)
        return torch.matmul(copies, model.weight), torch.matmul(x, model.other)

    assert_as_eager(Model(function))


def test_a_repeated_key_and_a_write_that_no_name_tells_of():
    B, H, L, D = 1, 2, 3, 4

    def function(x, model):
        k = x.flatten()[: 2 * L * D].reshape(B, 2, L, D).clone()
        key = k[:, :, None, :, :].expand(B, 2, H, L, D).reshape(B, 2 * H, L, D)
        F.leaky_relu(k, 0.1, True)
        q = key[:, :, :1] * 2
        return F.scaled_dot_product_attention(q, key, key) + k.sum()

    torch._dynamo.reset()
    model, x = Model(function), torch.randn(M, K)
    y, _ = compile_once(model, x)
    torch.testing.assert_close(y, function(x, model), rtol=1e-4, atol=1e-5)


def test_a_value_for_all_layers_that_shares_its_memory_is_not_computed_apart():
    def function(x, model):
        angles = torch.arange(128.0)[:, None] * torch.arange(64.0)
        cosine = angles.cos_()
        read = [x.sum() * cosine + number for number in range(5)]
        F.relu(cosine, True)
        return F.linear(x, model.weight), angles, *read

    assert_as_eager(Model(function))


# --- what one call does ---------------------------------------------------------------------------


def effect(function, *tensors, call=-1) -> Effect:
    """Of one call that the function traces to, by default the last."""
    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)(*tensors)
    graph = graphs[0].graph
    (mode,) = {node.meta["example_value"].fake_mode for node in graph.find_nodes(op="placeholder")}
    return Effects(mode)([node for node in graph.nodes if node.op.startswith("call")][call])


def test_effects_name_what_is_written_and_what_is_shared():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    assert effect(lambda a, b: a + b, a, b) == Effect()
    assert effect(lambda a, b: a.view_as(b), a, b) == Effect(shares=frozenset({0}))
    assert effect(lambda a, b: torch.addcmul(a, b, b, out=b), a, b) == Effect({1}, {1})
    assert effect(lambda a, b: torch._foreach_add_([a], [b]), a, b, call=0).writes == {0}
    assert effect(lambda a, b: F.dropout(a, 0.5, False), a, b) == Effect(shares=frozenset({0}))
    rebinds = effect(lambda a, b: setattr(a, "data", b + 1), a, b, call=1)
    assert rebinds == Effect({0}, {0, 1})


def test_a_size_that_depends_on_data_is_no_obstacle():
    assert effect(lambda a: a.nonzero(), torch.randn(4)) == Effect()
    assert effect(lambda a: a.sum().item(), torch.randn(4)) == Effect()


def test_under_autocast_a_result_does_not_share_the_weights_memory():
    def function(x, model):
        with torch.autocast("cpu", torch.bfloat16):
            return F.relu(F.linear(x, model.weight), True)

    torch._dynamo.reset()
    y, report = compile_once(Model(function), rows())
    assert report.decisions[0].accepted
    assert y.dtype == torch.bfloat16


def test_what_vmap_batches_is_not_written_to():
    def function(x, model):
        y = torch.vmap(lambda row: row * 2)(model.weight)
        return y.sum() + F.linear(x, model.weight)

    decisions, _ = assert_as_eager(Model(function))
    assert decisions[0].accepted


def test_equal_calls_are_run_once():
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    value.meta["example_value"] = torch.empty(3, device="meta")
    runs = []
    calls = [graph.call_function(lambda x: runs.append(x) or x.relu_(), (value,))]
    calls.append(graph.call_function(calls[0].target, (value,)))
    memory = memory_of(graph)
    assert len(runs) == 1
    assert memory.writers(value) == calls
    assert memory.share(calls[0], calls[1])


# --- weights that are functions of parameters -----------------------------------------------------


def tied(x, model):
    return F.linear(x, torch.cat([model.weight, model.other]))


COMPUTED = {
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(K, N)),
        "_weight_norm of parametrizations.weight.original1, parametrizations.weight.original0",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(K, N)),
        "truediv, vdot, mv of parametrizations.weight.original, parametrizations.weight.0._u, "
        "parametrizations.weight.0._v",
    ),
    "cat": (lambda: Model(tied), "cat of weight, other"),
    "product": (lambda: Model(lambda x, m: F.linear(x, m.weight.t() * m.bias)), "mul of weight, bias"),
    "scaled, in a body": (
        lambda: Model(lambda x, m: checkpoint(lambda x: x @ (m.weight * 2), x, use_reentrant=False)),
        "mul of weight",
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_a_function_of_parameters_is_named_as_that(name):
    make, computed = COMPUTED[name]
    model = make().eval().requires_grad_(False)
    y, report = compile_once(model, rows())
    reason = f"the weight is an activation, computed from parameters alone ({computed})"
    # What computes it may have products of its own.
    (linear,) = [each for each in report.decisions if not each.spelling.endswith("mv")]
    assert linear.reason == reason
    torch.testing.assert_close(y, model(rows()))


def test_a_weight_that_depends_on_the_input_is_an_activation():
    model = Model(lambda x, model: F.linear(x, model.weight * x.sum()))
    _, report = compile_once(model, rows())
    assert report.decisions[0].reason.startswith("the weight is an activation")


# --- at random ------------------------------------------------------------------------------------

VIEWS = {
    "rows": lambda t: t[1:],
    "columns": lambda t: t[..., 1:],
    "transpose": lambda t: t.transpose(0, -1),
    "adjoint": lambda t: t.mT if t.dim() == 2 else t,
    "diagonal": lambda t: t.diagonal() if t.dim() == 2 else t,
    "split": lambda t: t.tensor_split(2)[0],
    "unfold": lambda t: t.unfold(0, 2, 2),
    "atleast_3d": torch.atleast_3d,
    "view_as": lambda t: t.view_as(t),
    "expand_as": lambda t: t.expand_as(t),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "unsqueeze": lambda t: t.unsqueeze(0).squeeze(0),
    "flip, a copy": lambda t: t.flip(0),
}
SPELLINGS = {
    "method": lambda t: t.mul_(0.5),
    "function": lambda t: torch.clamp_(t, -0.2, 0.2),
    "foreach": lambda t: torch._foreach_mul_([t], 0.5),
    # Dynamo traces no other "out".
    "out": lambda t: torch.mul(t, 0.5, out=t) if t.is_contiguous() else t.mul_(0.5),
    "positional": lambda t: F.leaky_relu(t, 0.1, True),
    "item": lambda t: t.__setitem__(0, 0.0),
    "operator": lambda t: t.__imul__(0.5),
}
TARGETS = {
    "first weight": lambda x, y, model: model.weight,
    "second weight": lambda x, y, model: model.other,
    "activation": lambda x, y, model: x,
    "result": lambda x, y, model: y,
    "first bias": lambda x, y, model: model.bias,
    "second bias": lambda x, y, model: model.other_bias,
}


def written_at_random(target, views, spelling, is_input):
    def function(x, model):
        x = x if is_input else x * 1.5
        y = F.linear(x, model.weight, model.bias)
        value = TARGETS[target](x, y, model)
        for name in views:
            value = VIEWS[name](value)
        SPELLINGS[spelling](value)
        return y, F.linear(x, model.other, model.other_bias)

    return function


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    target=st.sampled_from(sorted(TARGETS)),
    views=st.lists(st.sampled_from(sorted(VIEWS)), max_size=3),
    spelling=st.sampled_from(sorted(SPELLINGS)),
    is_input=st.booleans(),
)
def test_random_writes_through_random_views(target, views, spelling, is_input):
    function = written_at_random(target, views, spelling, is_input)
    decisions, _ = assert_as_eager(Model(function))
    if "weight" not in target:
        assert all(decision.accepted for decision in decisions)


def test_memory_is_looked_at_as_often_for_many_sub_graphs_as_for_few():
    """A graph that writes has its memory looked at once a pass, and not once a pass and sub-graph."""

    def looked_at(blocks):
        def function(x, model):
            for _ in range(blocks):
                x = checkpoint(lambda x: F.linear(x, model.weight), x, use_reentrant=False)
            model.bias.add_(1)
            return x

        with mock.patch.object(compilation, "Memory", wraps=compilation.Memory) as looked:
            assert_as_eager(Model(function), calls=1)
        return looked.call_count

    assert looked_at(6) == looked_at(2)
