"""Weights by groups through Inductor's real CUDA output: executed, counted in launches, compiled."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8fx
from int8fx.kernels import packing, table
from int8fx.kernels.formats.grouped import WHOLE, from_codes
from int8fx.kernels.gpu import configs, grouped_packing, launch
from int8fx.kernels.gpu import grouped as gpu
from int8fx.kernels.gpu.grouped_configs import grouped_configs
from int8fx.kernels.ops import grouped_linear as ops
from int8fx.testing.gpuless import blocks
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.layers import (
    OURS,
    assert_compile_without_spills,
    inductors_own,
    serve_cpu_tensors_with_gpu_kernels,
)
from int8fx.testing.grouped_bound import expected_and_bound
from int8fx.testing.nogpu import fake_cuda
from int8fx.testing.nogpu.inductor import Launch, Wrapper, retargeted
from int8fx.testing.nogpu.interpreter import interpret

fake_cuda.install("H100")
serve_cpu_tensors_with_gpu_kernels()

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SCHEMES = ("w4a16-group", "w4a8-group", "w8a16-group")
each_scheme = pytest.mark.parametrize("name", SCHEMES)


def compiled(model: nn.Module, options: dict, **more: Any) -> nn.Module:
    # Else what Inductor computes in front of a kernel of ours is not rounded where eager rounds it.
    options = {**options, "inductor": {"emulate_precision_casts": True}}
    return torch.compile(model, backend="llmint8", options=options, fullgraph=True, **more)


def run(
    model: nn.Module, x: Tensor, options: dict, **more: Any
) -> tuple[Any, int8fx.Report, list[Launch], Wrapper]:
    torch._dynamo.reset()
    launches: list[Launch] = []
    with (
        torch.no_grad(),
        retargeted(launches.append) as wrappers,
        int8fx.collect_reports() as reports,
    ):
        y = compiled(model, options, **more)(x)
    (wrapper,) = wrappers
    return y, reports[0], launches, wrapper


def rows(M: int, K: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)) + 0.3
    x[:, K // 3] *= 20
    return x.to(dtype)


def linear_of(K: int, N: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(K)
    linear = nn.Linear(K, N, bias=bias)
    linear.weight.data.normal_(generator=generator)
    return linear.to(dtype).requires_grad_(False)


def names(launches: list[Launch]) -> list[str]:
    return [one.name for one in launches if one.name.startswith(OURS)]


# --- against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "M", "dtype", "K", "N", "options"),
    [
        ("w4a16-group", 1, FP16, 96, 80, {}),
        ("w4a16-group", 9, BF16, 300, 33, {"group_size": 48, "zeros": "float"}),
        ("w4a16-group", 40, FP16, 260, 48, {"group_size": 128}),
        ("w4a16-group", 3, FP32, 99, 17, {"group_size": 16, "zeros": "middle", "act_order": True}),
        ("w4a16-group", 17, FP16, 96, 40, {"group_size": WHOLE, "zeros": "offset"}),
        ("w4a16-group", 5, FP16, 96, 40, {"column_scale": True}),
        ("w4a16-group", 2, FP16, 2100, 20, {"group_size": 64}),  # in parts
        ("w4a8-group", 1, FP16, 96, 80, {}),
        ("w4a8-group", 9, BF16, 300, 33, {"columns": (5, 40, 41), "group_size": 64}),
        ("w4a8-group", 20, FP32, 100, 48, {"zeros": "middle", "rotation": "random-signs"}),
        ("w4a8-group", 40, FP16, 260, 48, {"rotation": "none"}),
        ("w4a8-group", 4, FP16, 99, 20, {"rotation": "none", "columns": (3, 70), "group_size": 16}),
        ("w4a8-group", 4, FP16, 99, 20, {"rotation": "none", "act_order": True}),
        ("w4a8-group", 7, FP16, 128, 20, {"group_size": WHOLE, "zeros": "float"}),
        ("w4a8-group", 2, FP16, 2112, 20, {"group_size": 256}),  # in parts
        ("w8a16-group", 1, FP16, 96, 80, {}),
        ("w8a16-group", 9, BF16, 300, 33, {"group_size": 48}),
        ("w8a16-group", 40, FP16, 260, 48, {"group_size": 256}),
    ],
    ids=str,
)
def test_a_linear_is_within_the_derived_bound_of_float64(name, M, dtype, K, N, options):
    linear, x = linear_of(K, N, dtype), rows(M, K, dtype)
    y, report, launches, _ = run(linear, x, {"rules": [("*", name, options)]})
    (decision,) = report.decisions
    assert decision.accepted and decision.scheme == name and not decision.note
    turns = name == "w4a8-group" and options.get("rotation") != "none"
    assert names(launches) == ["rotate_kernel"] * turns + ["grouped_gemm_kernel"]
    assert (launches[-1].arguments["SPLIT_K"] > 1) == (K > 2000)
    choice = int8fx.SCHEMES[name].choice(**options)
    if options.get("column_scale"):
        return  # of 1: what it is of others has a test of its own
    stored = choice.weight_format.quantize(linear.weight)
    expected, bound = expected_and_bound(choice, x, stored, linear.bias)
    assert ((y.double() - expected).abs() <= bound).all()


def test_columns_are_scaled_before_the_product(monkeypatch):
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 96), generator=generator, dtype=torch.uint8)
    choice = int8fx.SCHEMES["w4a16-group"].choice(zeros="middle", column_scale=True)
    scale = torch.rand(24, 3, generator=generator) + 0.5
    powers = 2.0 ** torch.arange(-3, 3).repeat(16)  # so that a scaled column is exact
    stored = *from_codes(codes, scale, None, None, 4, 32), powers
    x = rows(5, 96, FP32)
    packed = packing.pack(choice.weight_format, stored, 24, 96)
    y = choice.scheme.at_once(x, packed, None, choice.settings)
    plain = int8fx.SCHEMES["w4a16-group"].choice(zeros="middle")
    expected, bound = expected_and_bound(plain, x * powers, stored[:2], None)
    assert ((y.double() - expected).abs() <= bound).all()


# --- models ---------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Linears of one input."""

    def __init__(self, count: int, K: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(K, 32 + 16 * i, bias=False) for i in range(count))
        self.requires_grad_(False)

    def forward(self, x):
        return [linear(x) for linear in self.linears]


@each_scheme
@pytest.mark.parametrize(("count", "products"), [(1, 1), (3, 1), (4, 2)])
def test_up_to_three_linears_of_one_input_are_one_launch(name, count, products):
    model, x = Branches(count).half(), rows(5, 96, FP16)
    outputs, report, launches, _ = run(model, x, {"scheme": name})
    assert names(launches).count("grouped_gemm_kernel") == products
    (outcome,) = [each for each in report.passes if each.name == "join_grouped"]
    assert outcome.changed == products
    choice = int8fx.SCHEMES[name].choice()
    for y, linear in zip(outputs, model.linears, strict=True):
        stored = choice.weight_format.quantize(linear.weight)
        expected, bound = expected_and_bound(choice, x, stored, None)
        assert ((y.double() - expected).abs() <= bound).all()


def test_linears_that_keep_other_columns_share_a_launch():
    model, x = Branches(3).half(), rows(5, 96, FP16)
    for rotation in ("hadamard", "none"):
        columns = [(3, 9), (3, 10), (3, 9)]
        each = [{"columns": at, "rotation": rotation} for at in columns]
        rules = [(f"linears.{i}", "w4a8-group", options) for i, options in enumerate(each)]
        outputs, _, launches, _ = run(model, x, {"rules": rules})
        assert names(launches).count("grouped_gemm_kernel") == 1
        for y, linear, options in zip(outputs, model.linears, each, strict=True):
            choice = int8fx.SCHEMES["w4a8-group"].choice(**options)
            stored = choice.weight_format.quantize(linear.weight)
            expected, bound = expected_and_bound(choice, x, stored, None)
            assert ((y.double() - expected).abs() <= bound).all()


@each_scheme
@pytest.mark.parametrize("shape", [(1, 8), (2, 20)], ids=["M=8", "M=40"])
def test_a_block_is_rewritten_and_close_to_that_of_the_weights_read_back(name, shape):
    """Each product is compared by itself above; here a wrong tensor in a right place shows."""
    options = {"scheme": name, "group_size": 32}
    model, x = blocks.llama().half(), blocks.tokens(shape, FP16)
    y, report, launches, wrapper = run(model, x, options)
    assert [each.scheme for each in report.accepted] == [name] * 7
    # q/k/v, o, gate/up, down.
    assert names(launches).count("grouped_gemm_kernel") == 4
    int8fx.quantize_(model, **options)
    int8fx.dequantize_(model)
    with torch.no_grad():
        expected = model.float()(x.float())
    assert relative_error(y, expected) < (0.05 if name == "w4a8-group" else 5e-3)
    if name == "w4a8-group" and shape == (1, 8):  # the others' are of the same kinds
        for arch in ("sm_90", "gfx942"):
            assert_compile_without_spills(inductors_own(wrapper.kernels).values(), arch)


def test_a_quantised_model_is_compiled_to_the_same_kernels():
    """``quantize_`` packs for the device, and what is packed is taken."""
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)).half().requires_grad_(False)
    int8fx.quantize_(model, scheme="w4a16-group", group_size=32)
    packed = model[0].weight.tensors[0]
    assert tuple(packed.shape) == grouped_packing.packed_shape(64, 48)
    _, report, launches, _ = run(model, rows(5, 96, FP16), {})
    assert names(launches) == ["grouped_gemm_kernel"] * 2
    assert all(decision.accepted for decision in report.decisions)


def test_one_compile_serves_several_lengths():
    torch._dynamo.reset()
    model, launches = linear_of(96, 48, FP16), []
    choice = int8fx.SCHEMES["w4a8-group"].choice()
    stored = choice.weight_format.quantize(model.weight)
    with torch.no_grad(), retargeted(launches.append) as wrappers:
        call = compiled(model, {"scheme": "w4a8-group"}, dynamic=True)
        for M in (50, 33):
            y, x = call(rows(M, 96, FP16)), rows(M, 96, FP16)
            expected, bound = expected_and_bound(choice, x, stored, model.bias)
            assert ((y.double() - expected).abs() <= bound).all()
    assert len(wrappers) == 1


# --- eager, gradients, refusals -------------------------------------------------------------------


@each_scheme
def test_an_eager_product_is_the_same_operator(monkeypatch, name):
    """Of a weight that ``quantize_`` made."""
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    linear, x = linear_of(96, 40, FP32), rows(5, 96, FP32)
    choice = int8fx.SCHEMES[name].choice(group_size=32)
    stored = choice.weight_format.quantize(linear.weight)
    int8fx.quantize_(linear, scheme=name, group_size=32, only=["*"])
    expected, bound = expected_and_bound(choice, x, stored, linear.bias)
    y = linear(x)
    assert ((y.double() - expected).abs() <= bound).all()
    assert choice.scheme.at_once(x, linear.weight.tensors, linear.bias, choice.settings) is not None


@each_scheme
@pytest.mark.parametrize("M", [1, 40])
def test_gradients_are_straight_through(monkeypatch, name, M):
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    choice = int8fx.SCHEMES[name].choice(group_size=32)
    kept = choice.weight_format
    weight = linear_of(100, 48, FP32).weight
    x, bias = rows(M, 100, FP32).requires_grad_(), torch.zeros(48, requires_grad=True)
    y = choice.scheme.at_once(x, choice.quantize(weight), bias, choice.settings)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(M))
    y.backward(upstream)
    w_hat = kept.dequantize(kept.quantize(weight), *weight.shape)
    torch.testing.assert_close(x.grad, upstream @ w_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, upstream.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"group": 24}, "group=24; allowed: a multiple of 16"),
        ({"zeros": "half"}, "zeros='half'"),
        ({"zeros": "middle"}, "zeros='middle' with 1 zero points"),
        ({"weights": []}, "given 0 weights"),
        ({"weights": [torch.zeros(24, 48, dtype=torch.uint8)]}, r"uint8 \[24, 48\]"),
        ({"scales": [torch.zeros(24, 5)]}, r"scales \[24, 5\]"),
        ({"biases": [torch.zeros(24)] * 2}, "given 1 weights and 1, 1, 0, 0, 2"),
    ],
)
def test_what_does_not_fit_is_named(changed, words):
    choice = int8fx.SCHEMES["w4a16-group"].choice()
    packed, scale, zero_point = choice.quantize(torch.randn(24, 96))
    given: dict[str, Any] = {"group": 32, "zeros": "integer", "weights": [packed], "scales": [scale]}
    given |= {"zero_points": [zero_point], "biases": []} | changed
    with pytest.raises(ValueError, match=words):
        gpu.grouped_float_linears_gpu(torch.randn(2, 96), *given.values())


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_a_gpu_without_triton_leaves_four_bits_in_float_and_says_why(monkeypatch, operator):
    key = table.key_of("cpu", ops.FAMILY, operator)
    monkeypatch.setitem(
        table.KERNELS,
        key,
        dataclasses.replace(table.KERNELS[key], load=lambda: "torch sees no GPU"),
    )
    table.kernel_for.cache_clear()
    reason = table.refusal("cpu", ops.FAMILY, operator)
    table.kernel_for.cache_clear()
    assert reason == "no int8 kernel for device 'cpu': torch sees no GPU"


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", list(configs.GEMM))
@pytest.mark.parametrize("M", [1, 16, 17, 64, 500, 4096])
@pytest.mark.parametrize(("group", "bits"), [(32, 4), (48, 4), (128, 4), (WHOLE, 4), (16, 8), (128, 8)])
def test_tiles_fit_the_rows_and_the_groups(arch, M, group, bits):
    for N in (16, 600, 4096, 128256):
        for dtype in (FP16, FP32):
            found = grouped_configs(arch, M, N, 4096, group, bits, dtype, 132)
            assert found
            for config in found:
                assert (config.block_m == 16) is (M <= 16)
                assert config.parts == 1 or (M <= 16 and configs.counts_parts(arch))
                assert config.parts == 1 or -(-N // config.block_n) <= configs.COUNTERS
                assert config.block_k >= (64 if bits == 4 else 16)
                assert bits == 4 or group % config.block_k == 0
    if M <= 16 and configs.counts_parts(arch):
        assert grouped_configs(arch, M, 256, 4096, group, bits, FP16, 132)[-1].parts > 1
