"""The backend as a user meets it: options, modes, shapes, gradients, warnings, logging."""

import copy
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from int8fx import collect_reports
from int8fx.options import MODES, Options, inductor_patches
from int8fx.testing.support import assert_close_to_float64, compile_once

K, N = 32, 48


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(K), nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).eval()


@pytest.fixture
def x():
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    x[2, 7] = 30.0
    return x


def check(y, model, x):
    assert_close_to_float64(y, copy.deepcopy(model).double()(x.double()), K)


def test_the_backend_is_found_without_an_import():
    code = (
        "import torch, sys\n"
        "assert 'int8fx' not in sys.modules\n"
        "f = torch.compile(torch.nn.Linear(24, 8).requires_grad_(False), backend='llmint8')\n"
        "print(f(torch.randn(2, 24)).shape, 'int8fx' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "torch.Size([2, 8]) True", run.stderr
    assert "int8" not in run.stderr


@pytest.mark.parametrize("mode", MODES)
def test_modes(model, x, mode):
    y, _ = compile_once(model, x, mode=mode)
    check(y, model, x)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_dynamic_shapes(model, x, dynamic):
    compiles = {}
    for backend in ("inductor", "llmint8"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        with torch.no_grad():
            for rows in (5, 5, 9, 12, 9):
                batch = x[:1].expand(rows, -1).contiguous()
                check(compiled(batch), model, batch)
        compiles[backend] = counter.frame_count
    assert compiles["llmint8"] == compiles["inductor"]
    assert compiles["llmint8"] == (3 if dynamic is False else 2)


@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("threshold", [0, 3.0, float("inf")])
def test_options_reach_the_graph(model, x, threshold, decomposition):
    given = {"threshold": threshold, "decomposition": decomposition}
    y, report = compile_once(model, x, backend_options=given)
    check(y, model, x)
    assert f"{float(threshold)}, '{decomposition}'" in report.graph


def test_skip_and_only(model, x):
    _, report = compile_once(model, x, backend_options={"skip": ["1"]})
    assert [decision.reason for decision in report.decisions] == ["skip: matches '1'", ""]
    _, report = compile_once(model, x, backend_options={"only": ["1"]})
    assert [decision.reason for decision in report.decisions] == [
        "",
        "only: matches none of its patterns",
    ]


def test_inductor_options_and_torch_compile_options_reach_inductor(model, x):
    y, _ = compile_once(model, x, backend_options={"inductor": {"max_autotune": False}})
    check(y, model, x)
    with pytest.raises(Exception, match=r"'no_such_entry' is not an entry of torch._inductor.config"):
        compile_once(model, x, backend_options={"inductor": {"no_such_entry": 1}})


def test_size_assertions_are_left_out_unless_asked_for():
    assert not inductor_patches(None, Options())["size_asserts"]
    asked = Options(inductor={"size_asserts": True})
    assert inductor_patches("max-autotune", asked)["size_asserts"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"treshold": 6.0},
            "unknown option 'treshold'.*allowed: attention, background, calibration, check_weights, ",
        ),
        ({"threshold": "6"}, "'threshold'.*given '6' .str.; allowed: a number >= 0"),
        ({"threshold": -1.0}, "'threshold'.*given -1.0"),
        ({"threshold": float("nan")}, "'threshold'.*given nan"),
        ({"threshold": True}, "'threshold'.*given True"),
        ({"decomposition": "row"}, "'decomposition'.*given 'row'.*'column' or 'token'"),
        ({"skip": "lm_head"}, "'skip'.*given 'lm_head' .str.; allowed: a list"),
        ({"only": [1]}, "'only'.*given .1. .list."),
        ({"inductor": [1]}, "'inductor'.*given .1. .list.; allowed: a dict"),
    ],
)
def test_a_wrong_option_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        Options.parse(given)


def test_a_wrong_option_is_reported_at_the_first_call_and_leaves_the_model_alone(model, x):
    torch._dynamo.reset()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"option 'threshold'.*given -1"):
        torch.compile(model, backend="llmint8", options={"threshold": -1})(x)
    torch._dynamo.reset()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="mode='fast' is not known; allowed: default"):
        torch.compile(model, backend="llmint8", mode="fast")(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_stay(model, x, dtype):
    model, x = model.to(dtype), x.to(dtype)
    y, report = compile_once(model, x)
    assert y.dtype == dtype
    assert len(report.accepted) == 2
    assert "float16" not in report.graph or dtype == torch.float16
    check(y, model, x)


def test_float64_is_left_alone(model, x):
    y, report = compile_once(model.double(), x.double())
    assert "weight of torch.float64" in report.decisions[0].reason
    torch.testing.assert_close(y, model(x.double()))


def test_empty_batch(model):
    y, _ = compile_once(model, torch.empty(0, K))
    assert y.shape == (0, K)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("decomposition", ["column", "token"])
def test_gradients_flow_to_the_input_of_frozen_weights(x, threshold, decomposition):
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = nn.Linear(K, N).requires_grad_(False)
    given = {"threshold": threshold, "decomposition": decomposition}
    compiled = torch.compile(linear, backend="llmint8", fullgraph=True, options=given)
    x.requires_grad_(True)
    with collect_reports() as reports:
        y = compiled(x)
    assert reports[0].decisions[0].accepted
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    # The gradient is that of the int8 weight: straight through the rounding of x.
    from int8fx.kernels.ops.quantize_reference import quantize_weight

    w_int8, w_scale = quantize_weight(linear.weight)
    expected = upstream.double() @ (w_int8.double() * w_scale.double()[:, None])
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_trained_bias_gets_its_gradient(x):
    torch._dynamo.reset()
    linear = nn.Linear(K, N)
    linear.weight.requires_grad_(False)
    torch.compile(linear, backend="llmint8")(x).square().sum().backward()
    got = linear.bias.grad.clone()
    linear.bias.grad = None
    linear(x).square().sum().backward()
    torch.testing.assert_close(got, linear.bias.grad, rtol=0.05, atol=0.5)


def test_lora_over_a_frozen_base_trains_like_float(x):
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(K, N).requires_grad_(False)
            self.a, self.b = nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Lora()
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left 2 linears in float, because their weights require"):
        y = torch.compile(model, backend="llmint8")(x)
    y.square().mean().backward()
    reference(x).square().mean().backward()
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=0.1, atol=0.02)


def test_trainable_weights_stay_in_float_with_one_warning(model, x):
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="llmint8") as caught, collect_reports() as reports:
        y = torch.compile(model, backend="llmint8")(x)
    ours = [str(entry.message) for entry in caught if "llmint8" in str(entry.message)]
    assert len(ours) == 1
    assert "torch.no_grad()" in ours[0]
    assert "requires_grad_(False)" in ours[0]
    assert {decision.reason for decision in reports[0].decisions} == {"weight requires grad"}
    torch._dynamo.reset()
    assert torch.equal(y, torch.compile(model, backend="inductor")(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_quantises_trainable_weights(model, x, context):
    torch._dynamo.reset()
    with warnings.catch_warnings(), context(), collect_reports() as reports:
        warnings.simplefilter("error", UserWarning)
        y = torch.compile(model, backend="llmint8", fullgraph=True)(x)
    assert len(reports[0].accepted) == 2
    check(y, model, x)


class Recorded(nn.Module):
    """Records gradients, whoever calls it: test-time training, and guidance of a sampler."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.enable_grad():
            return self.inner(x)


class TrainsItself(Recorded):
    def forward(self, x):
        with torch.enable_grad():
            loss = self.inner(x).pow(2).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*self.inner.parameters()])])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_that_is_enabled_inside_of_no_grad_is_not_lost(model, x, frozen):
    torch._dynamo.reset()
    outer = Recorded(nn.Sequential(nn.LayerNorm(K), *model).requires_grad_(not frozen))
    x.requires_grad_()
    with torch.no_grad(), collect_reports() as reports:
        y = torch.compile(outer, backend="llmint8", fullgraph=True)(x)
    assert len(reports[0].accepted) == (2 if frozen else 0)
    y.pow(2).sum().backward()
    found = {name: each.grad for name, each in outer.named_parameters()} | {"x": x.grad}
    twin, double = copy.deepcopy(outer).double(), x.detach().double().requires_grad_()
    twin.zero_grad()
    twin(double).pow(2).sum().backward()
    expected = {name: each.grad for name, each in twin.named_parameters()} | {"x": double.grad}
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_a_model_that_trains_itself_under_no_grad(model, x):
    torch._dynamo.reset()
    outer = TrainsItself(model.requires_grad_())
    with torch.no_grad():
        y = torch.compile(outer, backend="llmint8")(x)
        torch.testing.assert_close(y, outer(x))


# --- what surrounds a linear ---------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpointing(model, x, use_reentrant, training):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=use_reentrant) * 2

    torch._dynamo.reset()
    outer = Checkpointed(model.requires_grad_(False))
    x = x.requires_grad_(training)
    with torch.set_grad_enabled(training), collect_reports() as reports:
        y = torch.compile(outer, backend="llmint8", fullgraph=True)(x)
        if training:
            y.sum().backward()
    assert len(reports[0].accepted) == 2, reports[0]
    assert [decision.path for decision in reports[0].decisions] == ["inner.1", "inner.3"]
    check(y.detach() / 2, model, x.detach())
    if training:
        twin = x.detach().double().requires_grad_(True)
        (copy.deepcopy(model).double()(twin) * 2).sum().backward()
        error = (x.grad.double() - twin.grad).norm() / twin.grad.norm()
        assert error < 0.05


def test_control_flow_with_weights_inside(x):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))

    torch._dynamo.reset()
    model = Branches().requires_grad_(False)
    compiled = torch.compile(model, backend="llmint8", fullgraph=True)
    with torch.no_grad(), collect_reports() as reports:
        y = compiled(x.abs()), compiled(-x.abs())
    assert len(reports[0].accepted) == 2
    assert_close_to_float64(y[0], F.linear(x.abs(), model.a.weight, model.a.bias).double(), K)
    assert_close_to_float64(y[1], F.linear(-x.abs(), model.b.weight, model.b.bias).double(), K)


def test_a_loop_with_a_weight_inside(x):
    from torch._higher_order_ops import while_loop

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(K, K)

        def forward(self, x):
            def body(i, x):
                return i + 1, torch.tanh(self.a(x))

            return while_loop(lambda i, x: i < 3, body, (torch.tensor(0), x))[1]

    model = Loop().requires_grad_(False)
    y, report = compile_once(model, x)
    assert len(report.accepted) == 1
    twin, expected = copy.deepcopy(model).double(), x.double()
    for _ in range(3):
        expected = torch.tanh(twin.a(expected))
    assert_close_to_float64(y, expected, K)


def test_autocast_decides_the_dtype(model, x):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), collect_reports() as reports:
        y = compiled(x)
        expected = model(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert len(reports[0].accepted) == 2
    check(y, model, x)


def test_autocast_inside_the_model(x):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(N, K)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.a(x)
            return self.b(h.float()), h

    model = Inside().requires_grad_(False)
    (y, h), _ = compile_once(model, x)
    assert (y.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    twin = copy.deepcopy(model).double()
    assert_close_to_float64(y, twin.b(twin.a(x.double())), K)


def test_module_compile_and_functions(model, x):
    torch._dynamo.reset()

    @torch.compile(backend="llmint8")
    def function(x):
        return model(x) + 1

    with torch.no_grad():
        check(function(x) - 1, model, x)
        twin = copy.deepcopy(model)
        twin.compile(backend="llmint8", options={"threshold": 0})
        check(twin(x), model, x)


def test_debug_logging_shows_each_decision(model, x, caplog):
    with caplog.at_level(logging.DEBUG, logger="int8fx"):
        compile_once(model, x)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "1 [N=48, K=32] torch.nn.functional.linear: llm.int8" in text


def test_torch_logs_names_the_package():
    code = (
        "import torch\n"
        "f = torch.compile(torch.nn.Linear(24, 16).requires_grad_(False), backend='llmint8')\n"
        "f(torch.randn(2, 24))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TORCH_LOGS": "+int8fx"},
    )
    assert "[N=16, K=24] torch.nn.functional.linear: llm.int8" in run.stderr


def test_a_torch_that_cannot_be_served_is_refused_by_name(monkeypatch):
    from int8fx.torch_private import check_torch

    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(RuntimeError, match=r"needs torch >= 2.11 \(tried on .*\).*2.9.1"):
        check_torch()


def test_a_second_process_finds_the_compiled_graph_in_the_cache(tmp_path):
    code = (
        "import torch\n"
        "from torch._dynamo.utils import counters\n"
        "model = torch.nn.Sequential(torch.nn.LayerNorm(24), torch.nn.Linear(24, 16)).eval()\n"
        "with torch.no_grad():\n"
        "    torch.compile(model, backend='llmint8')(torch.randn(2, 24))\n"
        "found = counters['inductor']\n"
        "print(found['fxgraph_cache_hit'], found['fxgraph_cache_miss'], found['fxgraph_cache_bypass'])"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        ).stdout.strip()
        for _ in range(2)
    ]
    assert printed == ["0 1 0", "1 0 0"]
