"""Every scheme: its lowering against its reference, compiled and not, and what each promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import int8fx
from int8fx.analysis.evaluate import contender
from int8fx.kernels import table
from int8fx.kernels.formats.format import ROWS, Axis, Part, WeightFormat
from int8fx.kernels.formats.groups import grouped
from int8fx.kernels.schemes.affine import quantize_affine_reference
from int8fx.kernels.schemes.scheme import Scheme, eagerly
from int8fx.kernels.schemes.settings import NoSettings
from int8fx.options import Options
from int8fx.testing.bounds import FP32
from int8fx.testing.support import compile_once

ROOT = Path(__file__).parents[1]
SCHEMES = int8fx.SCHEMES
K, N = 80, 48

DECOMPOSED = ["llm.int8", "llm.int8-zeropoint"]


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Rows that are not centred, with outliers in two columns."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.7
    x[..., 3] *= 9
    x[..., 41] -= 12
    return x.to(dtype)


def weights(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Channels of different sizes: one scale for all is worse than one each.
    scales = torch.logspace(-1, 0.5, N).unsqueeze(1)
    return torch.randn(N, K, generator=generator) * scales, torch.randn(N, generator=generator)


def apply(name: str, x: torch.Tensor, bias: bool = True, **settings):
    """What the lowering computes on tensors, and the scheme's reference in float64."""
    weight, offset = (tensor.to(x.dtype) for tensor in weights())
    choice = SCHEMES[name].choice(**settings)
    given = offset if bias else None
    y = choice.lower(eagerly, x, choice.quantize(weight), given)
    return y, choice.scheme.reference(x, weight, given, choice.settings), weight


def reference(name: str, x, weight, bias, **settings) -> torch.Tensor:
    return SCHEMES[name].reference(x, weight, bias, SCHEMES[name].choice(**settings).settings)


def assert_is_the_reference(y, expected, x, weight) -> None:
    """They differ by fp32 round-off of the sums, and by roundings to the dtype.

    A product of a 16-bit row and weight has one rounding of the weight and one of the result.
    """
    magnitude = x.double().abs() @ weight.double().abs().t() + expected.abs() + 1
    eps = torch.finfo(y.dtype).eps
    bound = FP32 * (K + 16) * 4 * magnitude + (0 if y.dtype == torch.float32 else eps) * magnitude
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 17, K), (0, K), (2, 0, K)], ids=str)
def test_lowering_is_the_reference(name, dtype, shape):
    x = activations(*shape, dtype=dtype)
    y, expected, weight = apply(name, x, bias=len(shape) != 2)
    assert_is_the_reference(y, expected, x, weight)


@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("threshold", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("name", DECOMPOSED)
def test_thresholds_and_decompositions(name, threshold, decomposition):
    x = activations(6, K)
    y, expected, weight = apply(name, x, threshold=threshold, decomposition=decomposition)
    assert_is_the_reference(y, expected, x, weight)


class Each(nn.Module):
    """One linear for each scheme, all of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleDict()
        for index, name in enumerate(SCHEMES):
            linear = self.linears[name.replace(".", "_")] = nn.Linear(K, N)
            linear.weight.data, linear.bias.data = weights(index)
        self.requires_grad_(False)

    def forward(self, x):
        return torch.stack([linear(x) for linear in self.linears.values()])


def rules() -> list[tuple[str, str]]:
    return [(f"linears.{name.replace('.', '_')}", name) for name in SCHEMES]


def test_compiled_together_each_is_its_reference():
    model, x = Each(), activations(5, K)
    y, report = compile_once(model, x, backend_options={"rules": rules()})
    assert [decision.scheme for decision in report.decisions] == list(SCHEMES)
    assert report.unused == ()
    for index, name in enumerate(SCHEMES):
        weight, bias = weights(index)
        expected = reference(name, x, weight, bias)
        assert_is_the_reference(y[index], expected, x, weight)


def test_groups_of_32_in_bf16_and_one_row():
    x = activations(1, K, dtype=torch.bfloat16)
    linear = nn.Linear(K, N).to(torch.bfloat16).requires_grad_(False)
    options = {"scheme": "w8a16-group", "group_size": 32}
    y, report = compile_once(linear, x, backend_options=options)
    assert report.graph.count("int8fx.group_linear.default(") == 1
    expected = reference("w8a16-group", x, linear.weight, linear.bias, group_size=32)
    assert_is_the_reference(y, expected, x, linear.weight)


def test_weights_alone_are_one_call_of_the_cpu_kernel():
    """What it computes is tested in ``test_cpu_kernel.py``."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(K, N), nn.Linear(K, N)
            self.requires_grad_(False)

        def forward(self, x):
            return self.first(x) + self.second(x)

    _, report = compile_once(Two(), activations(4, K), backend_options={"scheme": "w8a16"})
    (call,) = [line for line in report.graph.splitlines() if "int8fx.int8_linears" in line]
    assert "'all'" in call and "int8fx.quantize.default" not in report.graph


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_straight_through(name):
    x = activations(4, K).requires_grad_()
    weight, bias = weights()
    choice = SCHEMES[name].choice()
    kept = choice.weight_format.quantize(weight)
    bias.requires_grad_()
    grad = torch.randn(4, N, generator=torch.Generator().manual_seed(2))
    choice.lower(eagerly, x, choice.quantize(weight), bias).backward(grad)
    w_hat = choice.weight_format.dequantize(kept, N, K)
    torch.testing.assert_close(x.grad, grad @ w_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_linears_of_one_input_share_its_quantisation():
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(K, N) for _ in range(3)).requires_grad_(False)

        def forward(self, x):
            return sum(linear(x) for linear in self.linears)

    _, report = compile_once(Three(), activations(4, K), backend_options={"scheme": "zeropoint-vector"})
    assert report.graph.count("int8fx.quantize_affine.default(") == report.quantizations == 1
    assert report.graph.count("int8fx.int8_linear.default(") == 3
    assert "zeropoint-vector" in str(report)


# --- What each promises ---------------------------------------------------------------------------


def error(name: str, x: torch.Tensor) -> float:
    weight, _ = weights()
    y = reference(name, x, weight, None, **({"group_size": 16} if name == "w8a16-group" else {}))
    expected = x.double() @ weight.double().t()
    return ((y - expected).norm() / expected.norm()).item()


def test_the_papers_ordering_on_rows_of_different_sizes_with_outliers():
    x = activations(64, K) * torch.logspace(-1, 0.3, 64).unsqueeze(1)
    errors = [error(name, x) for name in ("absmax-tensor", "absmax-row", "absmax-vector", "llm.int8")]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]
    assert error("llm.int8-zeropoint", x) <= error("llm.int8", x)
    assert error("zeropoint-tensor", x) < error("absmax-tensor", x)
    assert error("w8a16-group", x) < error("w8a16", x) < error("llm.int8", x)


def test_a_zero_point_gains_a_bit_on_what_is_never_negative():
    x = activations(16, K).relu()
    assert error("zeropoint-vector", x) < 0.7 * error("absmax-vector", x)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("rows", ["ordinary", "constant", "zero", "far", "tiny", "outliers"])
def test_affine_rows_come_back_within_a_step(rows, per_tensor):
    x = {
        "ordinary": activations(4, K),
        "constant": torch.full((4, K), 5.0),
        "zero": torch.zeros(4, K),
        "far": 1000 + torch.rand(4, K, generator=torch.Generator().manual_seed(0)) * 1e-3,
        "tiny": activations(4, K) * 1e-30,
        "outliers": torch.full((4, K), 50.0),
    }[rows]
    x_int8, x_scale, x_offset, x_outlier, _ = quantize_affine_reference(
        x, 6.0 if rows == "outliers" else 0.0, "column", per_tensor, True
    )
    assert x_int8.abs().max() <= 127
    x_hat = x_int8.double() * x_scale.double().unsqueeze(-1) + x_offset.double().unsqueeze(-1)
    if rows == "outliers":
        assert torch.equal(x_hat, torch.zeros_like(x_hat)) and torch.equal(x_outlier, x)
    else:
        assert ((x_hat - x).abs() <= x_scale.double().unsqueeze(-1) * 1.001).all()
    assert x_scale.isfinite().all() and x_offset.isfinite().all()


def test_groups_that_do_not_divide_k():
    weight, _ = weights()
    kept = grouped(32)
    w_int8, w_scale = kept.quantize(weight)
    assert w_int8.shape == (N, 96) and w_scale.shape == (N, 3)
    w_hat = kept.dequantize((w_int8, w_scale), N, K)
    steps = w_scale.repeat_interleave(32, 1)[:, :K]
    assert ((w_hat - weight).abs() <= steps * 0.5001).all()


def test_w8a16_reads_the_packed_weight_of_llm_int8():
    formats = {name: SCHEMES[name].choice().weight_format.name for name in SCHEMES}
    assert formats["w8a16"] == formats["llm.int8"] == formats["absmax-vector"]
    assert len(set(formats.values())) == 10


@pytest.mark.parametrize("name", SCHEMES)
def test_a_product_of_tensors_is_traced_whole(name):
    """By any compiler, after a first call, which looked up under a lock which kernel serves."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator) for rows in (5, 96))
    choice = SCHEMES[name].choice()
    parts = choice.quantize(weight)
    expected = choice.product(x, parts, None)
    torch.compiler.reset()
    traced = torch.compile(choice.product, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x, parts, None), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_what_it_is(name):
    scheme = SCHEMES[name]
    assert scheme.name == name and scheme.formula in str(scheme) and scheme.source in str(scheme)
    known = {"threshold", "decomposition", "group_size", "block", "rotation", "columns"}
    known |= {"zeros", "act_order", "bits", "quant_type", "blocksize", "double_quant", "column_scale"}
    assert scheme.reads <= known
    assert table.kernel_for("cpu") is not None


# --- A new one ------------------------------------------------------------------------------------

BITS, GROUP = 4, 16


def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two weights to a byte, and a scale and a zero point for each group: [N, K / 2], [N, G] twice."""
    groups = weight.detach().to(torch.float32).unflatten(1, (-1, GROUP))
    least = groups.amin(-1)
    w_scale = (groups.amax(-1) - least) / (2**BITS - 1)
    steps = ((groups - least.unsqueeze(-1)) / w_scale.unsqueeze(-1)).round().to(torch.uint8).flatten(1)
    return steps[:, ::2] | steps[:, 1::2] << BITS, w_scale, least


def from_four_bits(tensors, N: int, K: int) -> torch.Tensor:
    packed, w_scale, least = tensors
    steps = torch.stack([packed & 15, packed >> BITS], -1).flatten(1).unflatten(1, (-1, GROUP))
    return (steps * w_scale.unsqueeze(-1) + least.unsqueeze(-1)).flatten(1)


def lower_four_bits(call, x, weight, bias, settings):
    w_hat = call(from_four_bits, weight, N, K)
    return call(torch.nn.functional.linear, x, w_hat, bias)


OF_GROUPS = (ROWS, Axis("K", GROUP))
IN_FOUR_BITS = WeightFormat(
    "4 bits",
    (
        Part("packed", torch.uint8, (ROWS, Axis("K", 2))),
        Part("scale", torch.float32, OF_GROUPS),
        Part("zero", torch.float32, OF_GROUPS),
    ),
    four_bits,
    from_four_bits,
    bits=BITS,
    granularity=GROUP,
)
FOUR_BITS = Scheme(
    "w4a16-of-a-test",
    "x as it is, w in 4 bits by groups of 16, with zero points",
    "tests/test_schemes.py",
    lambda settings: IN_FOUR_BITS,
    lower=lower_four_bits,
)


def test_a_new_scheme_is_one_object_and_one_row(monkeypatch):
    """Nothing else has to know it: packed weights, zero points and groups go through as they are."""
    monkeypatch.setitem(SCHEMES, FOUR_BITS.name, FOUR_BITS)
    model = nn.ModuleDict({"new": nn.Linear(K, N), "usual": nn.Linear(K, N)}).requires_grad_(False)
    weight, bias = weights()
    model["new"].weight.data, model["new"].bias.data = weight, bias
    model.forward = lambda x: torch.stack([model["new"](x), model["usual"](x)])
    x, options = activations(5, K), {"rules": [("new", FOUR_BITS.name)]}
    y, report = compile_once(model, x, backend_options=options)
    assert [decision.scheme for decision in report.decisions] == [FOUR_BITS.name, "llm.int8"]
    expected = reference(FOUR_BITS.name, x, weight, bias)
    assert_is_the_reference(y[0], expected, x, weight)
    # It is not the float product: 15 steps of each group's range are what 4 bits hold.
    exact = x.double() @ weight.double().t() + bias.double()
    assert 0.01 < (y[0] - exact).norm() / exact.norm() < 0.2
    new, _ = int8fx.explain(model, x, options=options).rows
    assert (new.scheme, new.kept_bytes) == (FOUR_BITS.name, N * K // 2 + 2 * 4 * N * K // GROUP)
    assert contender(FOUR_BITS.name) == {"scheme": FOUR_BITS.name}


LATER = """
import operator

import torch

from int8fx.kernels.formats.format import COLUMNS, ROWS, Part, WeightFormat
from int8fx.kernels.schemes.scheme import Scheme

FACTOR = 1.0
library = torch.library.Library("int8fx_of_a_test", "DEF")
library.define("scaled(Tensor x) -> (Tensor, Tensor)")
scaled = torch.ops.int8fx_of_a_test.scaled.default
library.impl("scaled", lambda x: (x * FACTOR, x.new_ones(1)), "CompositeExplicitAutograd")
torch.library.register_fake(
    "int8fx_of_a_test::scaled", lambda x: (torch.empty_like(x), x.new_empty(1)), lib=library
)


def decomposed(x):
    return x * FACTOR, x.new_ones(1)


def lower(call, x, weight, bias, settings):
    pair = call(scaled, x)
    x = call(torch.mul, call(operator.getitem, pair, 0), call(operator.getitem, pair, 1))
    return call(torch.nn.functional.linear, x, weight[0], bias)


WHOLE = Part("whole", None, (ROWS, COLUMNS))
KEPT = WeightFormat("whole", (WHOLE,), lambda weight: (weight.clone(),), lambda kept, N, K: kept[0])
SCHEME = Scheme(
    "later", "x times a factor", "a test", lambda settings: KEPT, lower=lower, quantizer=scaled,
    decompositions={scaled: decomposed},
)
"""
RUN_LATER = """
import torch
import int8fx
from torch import nn

model = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(2)]).requires_grad_(False)
for linear in model:
    nn.init.eye_(linear.weight)
model.forward = lambda x: model[0](x) + model[1](x)
x = torch.ones(2, 32)
torch.compile(model, backend="llmint8")(x)  # before there is a row
import later

int8fx.SCHEMES["later"] = later.SCHEME
torch._dynamo.reset()
with int8fx.collect_reports() as reports:
    y = torch.compile(model, backend="llmint8", options={"scheme": "later"})(x)
print(y[0, 0].item(), reports[0].quantizations)
"""


def test_a_row_added_after_a_compile_is_whole(tmp_path):
    """Its quantisation is shared and decomposed, and its source is part of the caches' keys."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))),
    }
    printed = []
    for factor in ("1.0", "3.0"):
        (tmp_path / "later.py").write_text(LATER.replace("FACTOR = 1.0", f"FACTOR = {factor}"))
        run = subprocess.run(
            [sys.executable, "-c", RUN_LATER],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout.strip())
    assert printed == ["2.0 1", "6.0 1"]


def test_the_row_of_a_test_is_gone():
    with pytest.raises(ValueError, match=FOUR_BITS.name):
        Options.parse({"scheme": FOUR_BITS.name})


# --- Choosing -------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_wins():
    options = Options.parse(
        {
            "threshold": 4.0,
            "scheme": "w8a16",
            "rules": [
                ("a.*", "llm.int8", {"threshold": 2.0}),
                ("*.b", "absmax-row"),
                ("a.b", "w8a16"),
                ("*.e", "llm.int8-zeropoint"),
            ],
        }
    )
    chosen = {path: options.choice(path) for path in ("a.b", "c.b", "c.d", "c.e")}
    assert {path: choice.scheme.name for path, choice in chosen.items()} == {
        "a.b": "llm.int8",
        "c.b": "absmax-row",
        "c.d": "w8a16",
        "c.e": "llm.int8-zeropoint",
    }
    assert chosen["c.e"].settings.threshold == 4.0
    assert chosen["a.b"].settings.threshold == 2.0
    assert chosen["c.b"].settings == NoSettings()
    assert options.unused(["a.b", "c.b", "c.e"]) == ("rules: 'a.b': w8a16",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheme": "int4"}, ["'scheme'", "'int4'", "'w8a16-group'"]),
        ({"rules": "w8a16"}, ["'rules'", "'w8a16'", "(pattern, scheme)"]),
        ({"rules": [("*",)]}, ["'rules'", "('*',)"]),
        ({"rules": [("*", "int4")]}, ["'rules'", "'int4'", "'llm.int8'"]),
        ({"rules": [(3, "w8a16")]}, ["'rules'", "(3, 'w8a16')"]),
        ({"rules": [("*", "w8a16", {"threshold": 3})]}, ["'w8a16' reads: none"]),
        ({"rules": [("*", "llm.int8", {"threshold": -3})]}, ["'threshold'", "-3", ">= 0"]),
        ({"group_size": 20}, ["'group_size'", "20", "multiple of 16"]),
        ({"group_size": True}, ["'group_size'", "True"]),
    ],
)
def test_bad_choices_are_named(given, words):
    with pytest.raises(ValueError, match="backend 'llmint8'") as raised:
        Options.parse(given)
    assert [word for word in words if word not in str(raised.value)] == []
