"""All the ways to call: what a model is made of, how it is compiled, and what goes in and comes out."""

import contextlib
import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import int8fx
from int8fx.testing.checked import checking
from int8fx.testing.support import assert_close_to_float64, compile_once

K, N, M = 32, 48, 5


@pytest.fixture
def x():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@contextlib.contextmanager
def checked():
    """Each int8 linear is compared with float64; yields the reports."""
    with checking() as seen, torch.no_grad(), int8fx.collect_reports() as reports:
        yield reports
    assert seen.linears > 0 and seen.worst <= 1, seen.worst_call


def accepted(reports):
    return [decision.path for report in reports for decision in report.accepted]


# --- modules --------------------------------------------------------------------------------------


class RecurrentAndLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.lstm, self.down = nn.Linear(K, N), nn.LSTM(N, K), nn.Linear(K, K)

    def forward(self, x):
        return self.down(self.lstm(self.up(x))[0])


def test_linears_beside_an_lstm(x):
    model = RecurrentAndLinear().eval()
    with torch.no_grad(), int8fx.collect_reports() as reports:
        y = torch.compile(model, backend="llmint8")(x)
    # Dynamo leaves modules with an RNN inside to eager, for any backend, unless it is told otherwise.
    assert reports == []
    torch.testing.assert_close(y, model(x))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True), checked() as reports:
        y = torch.compile(model, backend="llmint8")(x)
    assert accepted(reports) == ["up", "down"]
    assert_close_to_float64(y, copy.deepcopy(model).double()(x.double()), K)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(K, 4, N, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens = torch.randn(2, M, K)
    with checked() as reports:
        torch.compile(model, backend="llmint8")(tokens)
    paths = accepted(reports)
    assert sum(path.endswith(("linear1", "linear2")) for path in paths) == 4, paths


def test_a_method_a_block_and_a_closure(x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(K, K), nn.Linear(K, N)

        @torch.compile(backend="llmint8", fullgraph=True)
        def encode(self, x):
            return self.second(torch.relu(self.first(x)))

        def forward(self, x):
            return self.encode(x)

    model = Model().requires_grad_(False)
    with checked() as reports:
        model(x)
        torch.compile(lambda x: model.first(x) + 1, backend="llmint8", fullgraph=True)(x)
    assert accepted(reports) == ["first", "second", "first"]


def test_functional_call_reads_the_parameters_it_is_given(x):
    model = nn.Linear(K, N).requires_grad_(False)
    other = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    function = torch.compile(
        lambda parameters, x: torch.func.functional_call(model, parameters, (x,)), backend="llmint8"
    )
    with torch.no_grad(), int8fx.collect_reports() as reports:
        y = function(other, x)
        again = function({name: -value for name, value in other.items()}, x)
    expected = x @ other["weight"].t() + other["bias"]
    assert not reports[0].accepted  # a tensor that is an argument may differ at each call
    assert "activation" in reports[0].decisions[0].reason
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, -expected, rtol=1e-4, atol=1e-4)


# --- arguments and results ------------------------------------------------------------------------


@dataclass
class Result:
    hidden: torch.Tensor
    parts: dict


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(K, N)

    def forward(self, batch, *, scale=1.0, extra=None):
        y = self.linear(batch["x"][0]) * scale
        return Result(y, {"list": [y, (y + 1,)], "extra": extra})


def test_keywords_nested_containers_and_a_dataclass(x):
    model = Containers().requires_grad_(False)
    with checked() as reports:
        compiled = torch.compile(model, backend="llmint8", fullgraph=True)
        result = compiled({"x": [x]}, scale=2.0, extra="text")
    assert accepted(reports) == ["linear"]
    assert isinstance(result, Result)
    assert result.parts["extra"] == "text"
    assert torch.equal(result.parts["list"][1][0], result.hidden + 1)
    assert_close_to_float64(result.hidden, 2 * copy.deepcopy(model.linear).double()(x.double()), K)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:],
        lambda x: x[:, ::2].repeat(1, 2),
        lambda x: x.t().contiguous().t(),
        lambda x: x.unsqueeze(0).expand(3, -1, -1),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ],
    ids=["rows", "columns", "transposed", "expanded", "strided"],
)
def test_views_as_inputs(x, view):
    model = nn.Linear(K, N).requires_grad_(False)
    y, report = compile_once(model, view(x))
    assert len(report.accepted) == 1
    assert_close_to_float64(y, copy.deepcopy(model).double()(view(x).double()), K)


def test_an_in_place_residual_writes_into_the_callers_tensor(x):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(K, K)

        def forward(self, x):
            x += self.linear(x)
            return x.mul_(2)

    model = Residual().requires_grad_(False)
    before = x.clone()
    y, report = compile_once(model, x)
    assert len(report.accepted) == 1
    assert torch.equal(y, x)
    expected = 2 * (before.double() + copy.deepcopy(model.linear).double()(before.double()))
    assert_close_to_float64(y, expected, K)


# --- dtypes ---------------------------------------------------------------------------------------


class CastInside(nn.Module):
    def __init__(self, enabled):
        super().__init__()
        self.a, self.b = nn.Linear(K, N), nn.Linear(N, K)
        self.enabled = enabled

    def forward(self, x):
        h = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.b(h.float())


@pytest.mark.parametrize(("outside", "inside"), [(True, False), (False, True), (True, True)])
def test_autocast_on_either_side(x, outside, inside):
    model = CastInside(inside).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        expected = model(x)
        with checked() as reports:
            y = torch.compile(model, backend="llmint8", fullgraph=True)(x)
    assert accepted(reports) == ["a", "b"]
    assert y.dtype == expected.dtype
    assert_close_to_float64(y, expected.double(), K)


def test_integer_and_float64_matmuls_are_left_alone():
    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("whole", torch.randint(-9, 9, (K, N)))
            self.double_ = nn.Linear(K, N, dtype=torch.float64)

        def forward(self, x, i):
            return self.double_(x), i @ self.whole

    model = Exact().requires_grad_(False)
    x, i = torch.randn(M, K, dtype=torch.float64), torch.randint(-9, 9, (M, K))
    with torch.no_grad(), int8fx.collect_reports() as reports:
        y, products = torch.compile(model, backend="llmint8", fullgraph=True)(x, i)
    assert [decision.accepted for decision in reports[0].decisions] == [False, False]
    assert all("int8 takes the place of fp32" in decision.reason for decision in reports[0].decisions)
    assert torch.equal(products, i @ model.whole)
    torch.testing.assert_close(y, model.double_(x))


# --- export ---------------------------------------------------------------------------------------


def test_an_exported_program_compiles_as_the_module_does(x):
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU()).requires_grad_(False)
    exported = torch.export.export(model, (x,)).module()
    with checked() as reports:
        y = torch.compile(exported, backend="llmint8")(x)
    assert accepted(reports) == ["0"]
    assert_close_to_float64(y, copy.deepcopy(model).double()(x.double()), K)


def test_export_of_a_compiled_model_is_of_the_float_model(x):
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU()).requires_grad_(False)
    compiled = torch.compile(model, backend="llmint8")
    compiled(x)
    exported = torch.export.export(model, (x,))
    assert "int8fx" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_a_quantised_model_is_exported_and_compiled_ahead_of_time(x, tmp_path):
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU()).requires_grad_(False)
    int8fx.quantize_(model)
    rows = torch.export.Dim("rows", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "m.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    # The same operator on the same int8 weight; what surrounds it may round otherwise.
    torch.testing.assert_close(loaded(x[:3]), model(x[:3]), rtol=1e-6, atol=1e-6)
    # It needs int8fx imported wherever it is loaded, and says so.
    code = f"import torch; torch._inductor.aoti_load_package({package!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Could not find schema for int8fx::quantized_linears_cpu" in done.stderr
