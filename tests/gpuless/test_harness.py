"""The harness itself: what it adds to Triton's interpreter, and that it tells right from wrong."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from int8fx.testing.gpuless.where import Carried
from int8fx.testing.nogpu import fake_cuda, offline, sass
from int8fx.testing.nogpu.inductor import retargeted
from int8fx.testing.nogpu.interpreter import interpret

fake_cuda.install("H100")


@triton.jit
def largest(x, BLOCK: tl.constexpr):
    return tl.max(tl.where(tl.arange(0, BLOCK) < BLOCK, x, 0.0), 0)


@triton.jit
def scale_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index).to(tl.float32)
    tl.store(y_ptr + index, (x / largest(x, BLOCK)).to(y_ptr.dtype.element_ty))


@triton.jit
def product_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + row * BLOCK + column)
    b = tl.load(b_ptr + row * BLOCK + column).to(a_ptr.dtype.element_ty)
    y = tl.dot(a, b, out_dtype=tl.float32)
    tl.store(y_ptr + row * BLOCK + column, y.to(y_ptr.dtype.element_ty))


def test_a_kernel_is_interpreted_and_still_compiles_afterwards():
    x, y = torch.arange(1.0, 17.0), torch.empty(16)
    interpret(scale_kernel)[(1,)](x, y, BLOCK=16)
    assert torch.equal(y, x / 16)
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    compiled = offline.compile_kernel(scale_kernel, "sm_90", types, {"BLOCK": 1024}, 4, 3)
    assert sass.inspect(compiled).registers > 0


@pytest.mark.parametrize("other", [torch.bfloat16, torch.int8], ids=str)
def test_bf16_products_and_casts(other):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(torch.bfloat16)
    b = (10 * torch.randn(16, 16, generator=generator)).to(other)
    y = torch.empty(16, 16, dtype=torch.bfloat16)
    interpret(product_kernel)[(1,)](a, b, y, BLOCK=16)
    expected = (a.double() @ b.double()).to(torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=0.0)


def test_bf16_rounds_to_nearest_even():
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf")] + [1.0] * 11)
    scaled, y = x.clone(), torch.empty(16, dtype=torch.bfloat16)
    scaled[3:5] = 1.0
    interpret(scale_kernel)[(1,)](scaled, y, BLOCK=16)
    assert torch.equal(y, (scaled / scaled.max()).to(torch.bfloat16))


def test_generated_code_runs_and_is_what_computes_the_result():
    model = torch.nn.Sequential(torch.nn.LayerNorm(48), torch.nn.GELU(), torch.nn.Softmax(-1))
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.no_grad(), retargeted(seen.append) as wrappers:
        y = torch.compile(model)(x)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)
    (wrapper,) = wrappers
    assert [launch.name for launch in seen] == [kernel.name for kernel in wrapper.kernels]
    assert "empty_strided_cuda" in wrapper.code
    for kernel in wrapper.kernels:
        for compiled in offline.compile_generated(kernel, "sm_90"):
            assert sass.inspect(compiled).spill_bytes == 0


def test_a_launch_can_be_repeated_with_other_arguments():
    seen = []
    with torch.no_grad(), retargeted(seen.append):
        y = torch.compile(lambda x: x * 2 + 1)(torch.arange(8.0))
    (launch,) = seen
    changed = torch.zeros(8)
    (name,) = [name for name in launch.arguments if name.startswith("out_ptr")]
    launch.run(**{name: changed})
    np.testing.assert_array_equal(changed.numpy(), y.numpy())


def test_operands_are_carried_to_a_device_and_back():
    """How ``tests/test_gpu.py`` runs the kernel tests; the device here is another part of the CPU."""
    memory = torch.arange(40.0)
    x, y = memory[4:20], memory[20:36]
    elsewhere = Carried(interpret(scale_kernel), torch.device("cpu"))
    elsewhere[(1,)](x, y_ptr=y, BLOCK=16)
    assert torch.equal(memory[4:20], torch.arange(4.0, 20.0))
    assert torch.equal(y, x / 19)
    assert torch.equal(memory[36:], torch.arange(36.0, 40.0))
