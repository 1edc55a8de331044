"""Inductor's real CUDA output for whole blocks, executed: every int8 linear in it is checked.

Over a residual block a lost outlier path is an error of 2e-3 of the output, so blocks are not compared.
Each launch is, with the reference arithmetic on the values that it read.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import int8fx
from int8fx.kernels.gpu import experts as gpu_experts
from int8fx.kernels.gpu import launch
from int8fx.kernels.gpu import linear as gpu
from int8fx.kernels.gpu.decode import quantized_linear_reference
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.testing.gpuless import blocks
from int8fx.testing.gpuless.int8_launches import LinearCheck, relative_error
from int8fx.testing.gpuless.layers import (
    assert_compile_without_spills,
    inductors_own,
    serve_cpu_tensors_with_gpu_kernels,
)
from int8fx.testing.gpuless.linear_bound import CASES, assert_within_the_derived_bound
from int8fx.testing.nogpu import fake_cuda, offline, sass
from int8fx.testing.nogpu.inductor import Kernel, Launch, Wrapper, retargeted
from int8fx.testing.nogpu.interpreter import interpret

fake_cuda.install("H100")
serve_cpu_tensors_with_gpu_kernels()

# Agreement of one linear with the reference arithmetic. bf16 and fp16 round the result; the rest is
# fp32 summation in another order.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass
class Executed:
    """One compiled and executed block; its error is relative to the float block."""

    check: LinearCheck
    wrapper: Wrapper
    report: int8fx.Report
    error_of_block: float


@contextmanager
def checked(options: dict) -> Iterator[tuple[LinearCheck, list[Wrapper]]]:
    check = LinearCheck(options.get("threshold", 6.0), options.get("decomposition", "column"))
    with torch.no_grad(), retargeted(check) as wrappers:
        yield check, wrappers


def compiled(model: torch.nn.Module, options: dict, **more) -> torch.nn.Module:
    # Else a fused kernel would quantise the norm's unrounded fp32 value, 1e-3 from eager.
    inductor = {"emulate_precision_casts": True}
    options = {**options, "inductor": inductor}
    return torch.compile(model, backend="llmint8", options=options, fullgraph=True, **more)


@functools.cache
def run(name: str, shape: tuple[int, ...], dtype: torch.dtype, **options) -> Executed:
    torch._dynamo.reset()
    model = blocks.BLOCKS[name]().to(dtype)
    x = blocks.tokens(shape, dtype)
    with checked(options) as (check, wrappers), int8fx.collect_reports() as reports:
        y = compiled(model, options)(x)
    with torch.no_grad():
        expected = model.float()(x.float())
    (report,) = reports
    (wrapper,) = wrappers
    return Executed(check, wrapper, report, relative_error(y, expected))


EIGHT, FORTY = (1, 8), (2, 20)


@pytest.mark.parametrize(
    ("name", "shape", "decomposition"),
    [
        ("llama", EIGHT, "column"),
        ("llama", FORTY, "column"),
        ("gpt2", EIGHT, "token"),
        ("gpt2", FORTY, "column"),
        ("t5", EIGHT, "column"),
        ("t5", FORTY, "token"),
        ("moe", FORTY, "column"),
        ("mixtral", FORTY, "column"),
        ("qwen_moe", EIGHT, "token"),
        ("gpt_oss", EIGHT, "column"),
        ("gpt_oss", EIGHT, "token"),
    ],
    ids=str,
)
def test_every_linear_of_a_block_agrees_with_the_reference(name, shape, decomposition):
    done = run(name, shape, torch.float16, decomposition=decomposition)
    errors = done.check.errors
    assert done.report.accepted
    assert len(errors) == len(done.report.accepted)
    assert all(error < TOLERANCE[torch.float16] for error in errors), errors
    assert done.check.outliers > 0
    assert done.error_of_block < 0.05  # of int8 itself; a wrong tensor in a right place shows here


@pytest.mark.parametrize(
    ("name", "shape", "decomposition", "norms"),
    [
        ("llama", FORTY, "column", 2),
        ("gpt2", FORTY, "column", 1),  # the first is of a sum that Inductor computes on the way
        ("t5", FORTY, "token", 2),
        ("moe", FORTY, "column", 0),  # a router reads it, too
        ("llama", EIGHT, "column", 0),
    ],
    ids=str,
)
def test_norms_that_only_int8_linears_read_are_taken_by_our_kernel(name, shape, decomposition, norms):
    """And checked, each of them (``int8_launches.py``)."""
    done = run(name, shape, torch.float16, decomposition=decomposition)  # executed above
    assert done.check.norms == norms


@pytest.mark.parametrize(
    ("name", "shape", "decomposition"),
    [
        ("gpt2", EIGHT, "token"),
        ("gpt2", FORTY, "column"),
        ("t5", FORTY, "token"),
        ("moe", FORTY, "column"),
        ("mixtral", FORTY, "column"),
        ("gpt_oss", EIGHT, "column"),
    ],
    ids=str,
)
def test_what_quantises_in_a_block_compiles(name, shape, decomposition):
    """Llama's kernels are compiled for all targets (``test_launches.py``); these for some, in turn."""
    wrapper = run(name, shape, torch.float16, decomposition=decomposition).wrapper  # executed above
    kernels = inductors_own(wrapper.kernels).values()
    quantising = [kernel for kernel in kernels if "_ge_" in kernel.name]  # |x| >= threshold
    # Of experts the norm's and the activation's: all of them share one, and the router is in float. Of
    # the others what reads attention and the activation, and, for few rows, the norms.
    assert len(quantising) >= (3 if shape == EIGHT and name == "gpt2" else 2)
    for index, kernel in enumerate(quantising):
        for targets in (offline.NVIDIA, offline.AMD):
            assert_compile_without_spills([kernel], targets[(index + len(name)) % len(targets)])


def test_bf16():
    done = run("llama", (1, 33), torch.bfloat16)
    assert len(done.check.errors) == 7
    assert all(error < TOLERANCE[torch.bfloat16] for error in done.check.errors), done.check.errors
    assert done.error_of_block < 0.05


@pytest.mark.parametrize("shape", [EIGHT, FORTY], ids=["M=8", "M=40"])
def test_the_check_notices_that_the_outlier_product_is_missing(shape):
    """Negative control: the linears behind the norms, whose inputs have outliers, must fail."""
    done = run("llama", shape, torch.float16, decomposition="column")
    behind_norms = [done.check.without_outliers[index] for index in (0, 1, 2, 4, 5)]
    assert all(error > 20 * TOLERANCE[torch.float16] for error in behind_norms), behind_norms


@pytest.mark.parametrize(
    ("name", "shape", "decomposition", "behind_norms"),
    [("mixtral", FORTY, "column", [0]), ("gpt_oss", EIGHT, "column", [0])],
    ids=str,
)
def test_the_check_notices_it_of_experts_as_well(name, shape, decomposition, behind_norms):
    done = run(name, shape, torch.float16, decomposition=decomposition)
    errors = [done.check.without_outliers[index] for index in behind_norms]
    assert all(error > 20 * TOLERANCE[torch.float16] for error in errors), errors


def test_one_compile_serves_several_lengths():
    torch._dynamo.reset()
    model = blocks.llama().to(torch.float16)
    with checked({}) as (check, wrappers):
        call = compiled(model, {}, dynamic=True)
        for length in (50, 33):
            call(blocks.tokens((1, length), torch.float16))
        assert len(wrappers) == 1
        call(blocks.tokens((1, 1), torch.float16))  # torch specialises on 1
        assert len(wrappers) == 2
    assert len(check.errors) == 3 * 7
    assert all(error < TOLERANCE[torch.float16] for error in check.errors), check.errors


def test_one_compile_serves_any_mix_of_extended_and_plain_tiles(monkeypatch):
    """How many there are of either is arithmetic on the number of rows, in the wrapper."""
    monkeypatch.setattr(gpu.configs, "multiprocessors", lambda device: 8)
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(64, 512).half().requires_grad_(False)
    with checked({}) as (check, wrappers):
        call = compiled(model, {}, dynamic=True)
        for rows in (1030, 2000):
            x = torch.randn(rows, 64, generator=generator).half()
            x[rows // 2, 5] = 20.0
            call(x)
    assert len(wrappers) == 1
    assert len(check.errors) == 2 and check.outliers >= 2
    assert all(error < TOLERANCE[torch.float16] for error in check.errors), check.errors
    mixes = [gpu.configs.product_tiles(rows, 2, 8, 128, 64) for rows in (1030, 2000)]
    assert mixes == [(8, 6), (16, 8)]


class Indexed(torch.nn.Module):
    """More experts than Inductor unrolls a sum over."""

    def __init__(self, K: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(40, 24, K), requires_grad=False)

    def forward(self, x, experts):
        return torch.bmm(self.weight[experts], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("K", [64, 50])
def test_one_compile_serves_any_number_of_rows_of_experts(K):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    with checked({}) as (check, wrappers):
        call = compiled(Indexed(K), {}, dynamic=True)
        for rows in (30, 19):
            x = torch.randn(rows, K, generator=generator)
            x[rows // 2, 5] = 20.0
            y = call(x, torch.randint(-40, 40, (rows,), generator=generator))
            assert y.shape == (rows, 24)
    assert len(wrappers) == 1
    assert len(check.errors) == 2 and check.outliers >= 2
    assert all(error < 1e-5 for error in check.errors), check.errors


@pytest.mark.parametrize(("M", "dtype", "decomposition", "threshold"), CASES, ids=str)
def test_a_linear_is_within_the_derived_bound_of_float64(M, dtype, decomposition, threshold):
    with retargeted() as wrappers:
        assert_within_the_derived_bound(M, dtype, decomposition, threshold, torch.device("cpu"))
    assert len(wrappers) == 1


@pytest.mark.parametrize(
    ("M", "decomposition"), [(1, "column"), (9, "column"), (9, "token"), (40, "column"), (40, "token")]
)
def test_a_linear_whose_k_16_does_not_divide(M, decomposition):
    """Rows of the weight are packed to a length that it divides, and those of x are given zeros."""
    launches: list[Launch] = []
    with retargeted(launches.append):
        assert_within_the_derived_bound(M, torch.float16, decomposition, 6.0, torch.device("cpu"), K=99)
    assert launches[-1].arguments["w0_ptr"].shape == (80, 112)
    assert launches[-1].arguments["K"] == 112


@pytest.mark.parametrize("M", [1, 8, 40])
def test_gradients_are_straight_through(monkeypatch, M):
    """``grad @ ŵ`` for each linear of a group, summed; and biases that are trained.

    The operator itself, in the interpreter: torch's autograd engine, which is C++, asks for the device
    of a fake tensor, so a backward pass cannot be traced for a device that is not there.
    """
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    generator = torch.Generator().manual_seed(M)
    weights = [torch.randn(N, 64, generator=generator) for N in (48, 32)]
    packed, scales = zip(*map(quantize_weight, weights), strict=True)
    biases = [torch.zeros(N, requires_grad=True) for N in (48, 32)]
    x = (3 * torch.randn(M, 64, generator=generator)).requires_grad_(True)
    outputs = gpu.int8_linears_gpu(x, 6.0, "column", packed, scales, biases)
    upstream = [torch.randn(y.shape, generator=generator) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    expected = 0
    for y, w_int8, w_scale, bias, grad in zip(outputs, packed, scales, biases, upstream, strict=True):
        reference = quantized_linear_reference(x.detach(), 6.0, "column", w_int8, w_scale, None)
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(bias.grad, grad.sum(0), rtol=1e-5, atol=1e-5)
        expected = expected + grad @ (w_int8 * w_scale.unsqueeze(1))
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["mixed", "sorted"])
def test_gradients_of_experts_are_straight_through(monkeypatch, is_sorted):
    monkeypatch.setattr(launch, "wrap_triton", interpret)
    generator = torch.Generator().manual_seed(0)
    w_int8, w_scale = quantize_weight(torch.randn(4, 40, 64, generator=generator))
    x = (3 * torch.randn(30, 64, generator=generator)).requires_grad_(True)
    upstream = torch.randn(30, 40, generator=generator)
    experts = torch.randint(0, 5, (30,), generator=generator)
    routing = [experts]
    if is_sorted:
        experts = experts.sort().values
        routing = [None, torch.searchsorted(experts, torch.arange(4), right=True)]
    y = gpu_experts.expert_linear(x, 6.0, "column", w_int8, w_scale, *routing)
    y.backward(upstream)
    for expert in range(5):
        mine = experts == expert
        if expert == 4:  # none
            assert not y[mine].any() and not x.grad[mine].any()
            continue
        operands = w_int8[expert], w_scale[expert]
        reference = quantized_linear_reference(x[mine].detach(), 6.0, "column", *operands, None)
        torch.testing.assert_close(y[mine], reference, rtol=1e-5, atol=1e-4)
        expected = upstream[mine] @ (w_int8[expert] * w_scale[expert].unsqueeze(1))
        torch.testing.assert_close(x.grad[mine], expected, rtol=1e-5, atol=1e-4)


# nf4 is de-quantised by a constant of Inductor's, its codebook, which cannot be copied to a GPU that is
# not there.
ON_A_GPU = {name: scheme for name, scheme in int8fx.SCHEMES.items() if name != "nf4"}


class EachScheme(torch.nn.Module):
    """A linear for each scheme, all of the same input."""

    def __init__(self, K: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(K, N) for _ in ON_A_GPU)

    def forward(self, x):
        return torch.stack([linear(x) for linear in self.linears])


K, N = 96, 40


@pytest.mark.parametrize(("M", "K"), [(1, K), (8, K), (40, K), (1, 99), (40, 99)])
def test_every_scheme_is_its_reference_and_compiles(M, K):
    torch._dynamo.reset()
    model = EachScheme(K).to(torch.float16).requires_grad_(False)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(torch.float16) + 0.5
    x[:, 5] = 20.0
    rules = [(f"linears.{index}", name) for index, name in enumerate(ON_A_GPU)]
    launches: list[Launch] = []
    with (
        torch.no_grad(),
        retargeted(launches.append) as wrappers,
        int8fx.collect_reports() as reports,
    ):
        y = compiled(model, {"rules": rules})(x)
    (wrapper,) = wrappers
    left = {each.path: each.reason for each in reports[0].decisions if not each.accepted}
    errors = {}
    for (index, (name, scheme)), linear in zip(enumerate(ON_A_GPU.items()), model.linears, strict=True):
        expected = scheme.reference(x, linear.weight, linear.bias, scheme.settings())
        if f"linears.{index}" in left:
            expected = torch.nn.functional.linear(
                x.double(), *(each.double() for each in linear.parameters())
            )
        errors[name] = relative_error(y[index], expected)
    # One rounding of the outlier product and one of the result, beside that of the result alone.
    assert all(error < 2 * TOLERANCE[torch.float16] for error in errors.values()), errors
    # Our kernels multiply for the five schemes whose rows they quantise (w8a16's are outliers all, and
    # of more than 16 rows left in float), and for the three by groups. For the four with rows of their
    # own cuBLAS does, in int8: up to 16 rows these are sums of Inductor's.
    assert sum(map(linears_of, launches)) == (7 if M > 16 else 8)
    if M > 16:
        (reason,) = left.values()
        assert "'w8a16' on a GPU is faster than 16-bit up to 16 rows" in reason and "has 40" in reason
    else:
        assert not left
        names = [launch.name for launch in launches]
        assert names.count("decode_kernel") >= 2 and "quantize_gather_kernel" not in names
    assert wrapper.extern_launches.count("extern_kernels._int_mm") == (4 if M > 16 else 0)
    if M == 1 or K % 16:
        return  # the same but for what is summed, or padded; and every compile takes its time
    for arch in ("sm_90", "gfx942"):
        assert_compile_without_spills(inductors_own(wrapper.kernels).values(), arch)
        for kernel in filter(multiplies, wrapper.kernels):
            seen = sass.inspect(offline.compile_generated(kernel, arch, first=True)[0])
            assert seen.int8_mma and not seen.spill_bytes, (kernel.name, arch)


def multiplies(kernel: Kernel) -> bool:
    return kernel.name.startswith(("decode_kernel", "gemm_kernel", "rotated_gemm_kernel"))


def linears_of(launch: Launch) -> int:
    """How many linears a launch is the product of."""
    return sum(
        launch.arguments.get(f"N{index}", 0) > 0 for index in range(3) if "y0_ptr" in launch.arguments
    )
