"""Rotated int8 through Inductor's real CUDA output: executed, counted in launches, compiled."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import int8fx
from int8fx.kernels.gpu import configs, launch
from int8fx.kernels.gpu import rotated as gpu
from int8fx.kernels.schemes.static_columns import operands
from int8fx.testing.gpuless import blocks
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.layers import (
    OURS,
    assert_compile_without_spills,
    decoder_layer,
    generated,
    inductors_own,
    layer_input,
    serve_cpu_tensors_with_gpu_kernels,
)
from int8fx.testing.gpuless.rotated_launches import RotatedCheck
from int8fx.testing.nogpu import fake_cuda, offline
from int8fx.testing.nogpu.inductor import Launch, Wrapper, retargeted
from int8fx.testing.nogpu.interpreter import interpret
from int8fx.testing.rotations import expected_and_bound

fake_cuda.install("H100")
serve_cpu_tensors_with_gpu_kernels()

# Agreement of one linear with the reference arithmetic: what rounding the result leaves.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
EIGHT, FORTY = (1, 8), (2, 20)
ROTATED = {"scheme": "int8-rotated"}


def calibrated(model: nn.Module, x: torch.Tensor, **options) -> dict:
    return {**ROTATED, "calibration": int8fx.calibrate(model, [x]), **options}


def compiled(model: nn.Module, options: dict, **more) -> nn.Module:
    # Else what Inductor computes in front of a kernel of ours is not rounded where eager rounds it.
    options = {**options, "inductor": {"emulate_precision_casts": True}}
    return torch.compile(model, backend="llmint8", options=options, fullgraph=True, **more)


@dataclass
class Executed:
    """One compiled and executed block; its error is relative to the float block."""

    check: RotatedCheck
    wrapper: Wrapper
    report: int8fx.Report
    error_of_block: float


@functools.cache
def run(name: str, shape: tuple[int, ...], dtype: torch.dtype, with_columns: bool) -> Executed:
    torch._dynamo.reset()
    model, x = blocks.BLOCKS[name]().to(dtype), blocks.tokens(shape, dtype)
    options = calibrated(model, x) if with_columns else ROTATED
    check = RotatedCheck()
    torch._dynamo.reset()
    with torch.no_grad(), retargeted(check) as wrappers, int8fx.collect_reports() as reports:
        y = compiled(model, options)(x)
    with torch.no_grad():
        expected = model.float()(x.float())
    (report,), (wrapper,) = reports, wrappers
    return Executed(check, wrapper, report, relative_error(y, expected))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "with_columns", "norms"),
    [
        ("llama", EIGHT, torch.float16, True, 2),
        ("llama", FORTY, torch.float16, False, 2),
        ("gpt2", FORTY, torch.float16, True, 2),  # also of a sum that Inductor computes on the way
        ("t5", (1, 33), torch.bfloat16, True, 2),
        ("moe", EIGHT, torch.float16, True, 0),  # a router reads the norm, too
    ],
    ids=str,
)
def test_every_linear_of_a_block_agrees_with_the_reference(name, shape, dtype, with_columns, norms):
    done = run(name, shape, dtype, with_columns)
    accepted = [decision for decision in done.report.decisions if decision.accepted]
    assert {decision.scheme for decision in accepted} == {"int8-rotated"}
    assert len(done.check.errors) == len(accepted) > 2
    assert all(error < TOLERANCE[dtype] for error in done.check.errors), done.check.errors
    assert done.check.norms == norms
    # Of int8 itself; a wrong tensor in a right place shows here.
    assert done.error_of_block < (0.02 if with_columns else 0.05)
    assert not done.wrapper.extern_launches or "_int_mm" not in str(done.wrapper.extern_launches)


def test_the_check_notices_that_the_columns_product_is_missing():
    """Negative control: the linears behind the norms, two of whose channels are large, must fail."""
    done = run("llama", EIGHT, torch.float16, True)
    behind_norms = [done.check.without_columns[index] for index in (0, 1, 2, 4, 5)]
    assert all(error > 20 * TOLERANCE[torch.float16] for error in behind_norms), behind_norms


def test_linears_of_one_input_share_its_rotation_where_their_columns_are_the_same():
    """Which is known when they run: of a calibration they are, and by rule they are what one says."""
    done = run("llama", EIGHT, torch.float16, True)
    assert done.check.sets == [[0, 0, 0], [0], [0, 0], [0]]
    model = Branches().half()
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).half()
    columns = [(3, 9), (3, 10), (3, 9)]
    rules = [(f"linears.{i}", "int8-rotated", {"columns": each}) for i, each in enumerate(columns)]
    check = RotatedCheck()
    torch._dynamo.reset()
    with torch.no_grad(), retargeted(check):
        outputs = compiled(model, {"rules": rules})(x)
    assert check.sets == [[0, 1, 0]]
    assert all(error < TOLERANCE[torch.float16] for error in check.errors), check.errors
    for linear, y, each in zip(model.linears, outputs, columns, strict=True):
        expected, bound = expected_and_bound(x, linear.weight, None, each, 64, "hadamard")
        assert ((y.double() - expected).abs() <= bound).all()


class Branches(nn.Module):
    """Three linears of one input."""

    def __init__(self, K: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(K, N, bias=False) for N in (48, 32, 80))
        self.requires_grad_(False)

    def forward(self, x):
        return [linear(x) for linear in self.linears]


@pytest.mark.parametrize(
    ("M", "dtype", "K", "N", "options"),
    [
        (1, torch.float16, 96, 80, {}),
        (9, torch.bfloat16, 300, 33, {"block": 256, "columns": (5, 40, 41)}),
        (17, torch.float32, 100, 80, {"rotation": "random-signs", "columns": (5,)}),
        (20, torch.float16, 1000, 112, {"block": 16, "columns": tuple(range(0, 64))}),
        (5, torch.float16, 17000, 20, {"columns": (5, 16999)}),  # too long for registers, K in parts
    ],
    ids=str,
)
def test_a_linear_is_within_the_derived_bound_of_float64(M, dtype, K, N, options):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(M)
    linear = nn.Linear(K, N)
    linear.weight.data.normal_(generator=generator)
    x = torch.randn(M, K, generator=generator)
    x[:, 5] *= 30.0
    linear, x = linear.to(dtype).requires_grad_(False), x.to(dtype)
    launches: list[Launch] = []
    with torch.no_grad(), retargeted(launches.append), int8fx.collect_reports() as reports:
        y = compiled(linear, {"rules": [("*", "int8-rotated", options)]})(x)
    assert len(reports[0].accepted) == 1
    assert [one.name for one in launches if one.name.startswith(OURS)] == [
        "rotate_kernel",
        "rotated_gemm_kernel",
    ]
    how = options.get("columns", ()), options.get("block", 64), options.get("rotation", "hadamard")
    expected, bound = expected_and_bound(x, linear.weight, linear.bias, *how)
    assert ((y.double() - expected).abs() <= bound).all()


def test_one_compile_serves_several_lengths():
    torch._dynamo.reset()
    model, check = blocks.llama().half(), RotatedCheck()
    with torch.no_grad(), retargeted(check) as wrappers:
        call = compiled(model, ROTATED, dynamic=True)
        for length in (50, 33):
            call(blocks.tokens((1, length), torch.float16))
        assert len(wrappers) == 1
        call(blocks.tokens((1, 1), torch.float16))  # torch specialises on 1
        assert len(wrappers) == 2
    assert len(check.errors) == 3 * 7
    assert all(error < TOLERANCE[torch.float16] for error in check.errors), check.errors


@pytest.mark.parametrize("arch", list(configs.GEMM))
@pytest.mark.parametrize("M", [1, 16, 17, 64, 500, 4096])
def test_products_have_plain_tiles_and_parts_that_can_be_counted(arch, M):
    for N in (16, 600, 4096, 128256):
        for dtype in TOLERANCE:
            found = gpu.product_configs(arch, M, N, 4096, dtype, 132)
            assert found
            for config in found:
                tiles = -(-M // config.block_m) * -(-N // config.block_n)
                assert (config.block_m == 16) is (M <= 16)
                assert config.parts == 1 or tiles <= configs.COUNTERS
                assert configs.counts_parts(arch) or config.parts == 1
    if M <= 64:
        assert gpu.product_configs("sm_90", M, 256, 4096, torch.float16, 132)[-1].parts > 1


@pytest.mark.parametrize("M", [1, 8, 40])
def test_gradients_are_straight_through(monkeypatch, M):
    """``grad @ ŵ`` for each linear of a group, summed; in the interpreter, as in test_executed.py."""
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    generator = torch.Generator().manual_seed(M)
    choice = int8fx.SCHEMES["int8-rotated"].choice(columns=(3, 70), block=32)
    weights = [torch.randn(N, 100, generator=generator) for N in (48, 32)]
    parts = [operands(choice.quantize(weight)) for weight in weights]
    biases = [torch.zeros(N, requires_grad=True) for N in (48, 32)]
    x = (3 * torch.randn(M, 100, generator=generator)).requires_grad_(True)
    lists = [list(each) for each in zip(*parts, strict=True)]
    outputs = gpu.rotated_linears_gpu(x, 0.0, 32, "hadamard", *lists, biases)
    upstream = [torch.randn(y.shape, generator=generator) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    expected = 0
    for y, weight, bias, grad in zip(outputs, weights, biases, upstream, strict=True):
        exact, bound = expected_and_bound(x.detach(), weight, None, (3, 70), 32, "hadamard")
        assert ((y.detach().double() - exact).abs() <= bound).all()
        torch.testing.assert_close(bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)
        kept = choice.weight_format
        expected = expected + grad @ kept.dequantize(kept.quantize(weight), *weight.shape)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-4)


def test_an_eager_product_is_the_same_operator(monkeypatch):
    """Of a weight that ``quantize_`` made."""
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 40).requires_grad_(False), torch.randn(5, 96)
    weight = linear.weight
    int8fx.quantize_(linear, scheme="int8-rotated", columns=[3, 50], only=["*"])
    lists = [[part] for part in operands(linear.weight.tensors)]
    (expected,) = gpu.rotated_linears_gpu(x, 0.0, 64, "hadamard", *lists, [linear.bias])
    assert torch.equal(linear(x), expected)
    exact, bound = expected_and_bound(x, weight, linear.bias, (3, 50), 64, "hadamard")
    assert ((expected.double() - exact).abs() <= bound).all()


# --- what there is none of on a GPU -----------------------------------------------------------------


def refused(model: nn.Module, x: torch.Tensor, options: dict) -> list[str]:
    torch._dynamo.reset()
    with torch.no_grad(), retargeted([].append), int8fx.collect_reports() as reports:
        y = compiled(model, options)(x)
    assert relative_error(y, model(x)) < TOLERANCE[torch.float16]
    return [decision.reason for decision in reports[0].decisions if not decision.accepted]


def test_outliers_beside_static_columns_stay_in_float_and_say_why():
    model = nn.Linear(96, 40).half().requires_grad_(False)
    (reason,) = refused(model, torch.randn(4, 96).half(), {"decomposition": "static"})
    assert reason.endswith("outliers beside static columns are in the CPU's kernels alone")


class ExpertOfTheLargest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 32, 64), requires_grad=False)

    def forward(self, x):
        return torch.bmm(self.weight[x[:, :5].argmax(-1)], x.unsqueeze(-1)).squeeze(-1)


def test_rotated_experts_stay_in_float_and_say_why():
    (reason,) = refused(ExpertOfTheLargest().half(), torch.randn(9, 64).half(), ROTATED)
    assert reason == "the GPU's kernels of experts have no rotation"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"threshold": 6.0}, "threshold"),
        ({"rotation": "none"}, "no product on a GPU"),
        ({"block": 48}, "block"),
        ({"weights": []}, "given 0"),
        ({"weights": [torch.zeros(24, 90, dtype=torch.int8)]}, r"int8 \[24, 90\].*int8 \[N, 96\]"),
        ({"columns": [torch.tensor([3], dtype=torch.int32)]}, r"columns \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(changed, words):
    choice = int8fx.SCHEMES["int8-rotated"].choice(columns=(3, 70))
    names = "weights", "w_scales", "w_columns", "columns"
    parts = operands(choice.quantize(torch.randn(24, 96)))
    given = {"threshold": 0.0, "block": 64, "rotation": "hadamard"}
    given |= {name: [part] for name, part in zip(names, parts, strict=True)} | changed
    with pytest.raises(ValueError, match=words):
        gpu.rotated_linears_gpu(torch.randn(2, 96), *given.values(), [])


# --- launches ---------------------------------------------------------------------------------------


class NormLinear(nn.Module):
    """A linear, a norm of the residual sum, and linears that read it."""

    def __init__(self, K: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(K, K), nn.RMSNorm(K)
        self.linears = nn.ModuleList(nn.Linear(K, N) for N in widths)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        total = x + self.first(x)
        h = self.norm(total)
        return [total, *(linear(h) for linear in self.linears)]


def launches_of(M: int, widths: tuple[int, ...], **options) -> list[str]:
    model = NormLinear(1024, widths).half().requires_grad_(False)
    return generated(model, torch.empty(M, 1024, dtype=torch.float16), **options).launches


@pytest.mark.parametrize("M", [1, 16, 17, 4096])
def test_a_norm_and_its_linears_take_no_more_launches_than_token(M):
    widths = (512, 256, 256)
    token = launches_of(M, widths, decomposition="token")
    columns = {"columns": (3, 9)} if M % 2 else {}
    launches = launches_of(M, widths, rules=[("*", "int8-rotated", columns)])
    expected = ["rotate_kernel", "rotated_gemm_kernel"] * 2
    assert [name.rstrip("_0123456789") for name in launches] == expected
    assert len(launches) <= len(token), token


@functools.cache
def layer(M: int, scheme: str) -> Wrapper:
    options = ROTATED if scheme == "int8-rotated" else {"decomposition": "token"}
    return generated(decoder_layer(torch.float16), layer_input(M, torch.float16), **options)


@pytest.mark.parametrize("M", [1, 16, 64])
def test_llama_decoder_layer(M):
    """Seven linears read four activations, each two launches of ours, norms included.

    With few rows, what Inductor computes in front of o_proj and down_proj it quantises for ``token`` on
    the way. Here it writes that for the kernel that rotates: two launches more in the layer.
    """
    wrapper = layer(M, "int8-rotated")
    launched = [name for name in wrapper.triton_launches if name.startswith(OURS)]
    assert len(launched) == 8, launched
    token = layer(M, "token")
    assert len(wrapper.launches) <= len(token.launches) + (2 if M <= 16 else 0), (
        wrapper.launches,
        token.launches,
    )


def test_nothing_waits_for_the_device_and_no_shape_depends_on_data():
    for M in (16, 64):
        for call in (".item()", "synchronize", ".cpu()", "nonzero", "unbacked"):
            assert call not in layer(M, "int8-rotated").body


@pytest.mark.parametrize("arch", offline.TARGETS)
def test_what_inductor_writes_around_it_compiles_without_spills(arch):
    kernels = [
        kernel for M in (16, 64) for kernel in inductors_own(layer(M, "int8-rotated").kernels).values()
    ]
    assert kernels
    assert_compile_without_spills(kernels, arch)
