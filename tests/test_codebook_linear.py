"""Linears of codebook weights: every instruction set against the reference, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.formats.codebook import CODEBOOKS, absmax_of, codebook, values_of
from int8fx.kernels.gpu import composed
from int8fx.kernels.ops.codebook_linear import codebook_linear, codebook_linear_backward, decoded
from int8fx.testing.support import compile_once

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no CPU kernel: {REASON}")
ISAS = [*cpu.isas(), "auto"] if REASON is None else []
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
# Blocks that end in the middle of a byte, and of a vector; rows that end in the middle of a block.
SHAPES = [(5, 64, 64), (3, 128, 32), (7, 100, 64), (4, 90, 7), (2, 33, 16), (1, 1, 1), (6, 4096, 4096)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def weight_of(name, N, K, block, nested=False):
    weight = torch.randn(N, K, generator=generator(0)) * torch.logspace(-3, 2, N).unsqueeze(1)
    packed, *others = codebook(name, block, nested).quantize(weight)
    return packed, absmax_of(others), values_of(name, packed), block


@each_isa
@each_dtype
@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize(("N", "K", "block"), SHAPES)
def test_the_weight_is_the_references_bit_for_bit(N, K, block, name, dtype, isa):
    weight = weight_of(name, N, K, block)
    expected = decoded(*weight, K).to(dtype)
    # A product with the identity is the weight itself: every other term is 0.
    assert torch.equal(codebook_linear(torch.eye(K, dtype=dtype), *weight, None), expected.t())
    assert torch.equal(codebook_linear_backward(torch.eye(N, dtype=dtype), *weight, K), expected)


@each_dtype
@pytest.mark.parametrize("shape", [(64,), (1, 64), (9, 64), (2, 3, 64), (0, 64)], ids=str)
def test_the_product_is_torchs(shape, dtype):
    weight = weight_of("nf4", 48, 64, 16, nested=True)
    x = torch.randn(shape, generator=generator(1)).to(dtype)
    bias = torch.randn(48, generator=generator(2))
    expected = F.linear(x, decoded(*weight, 64).to(dtype), bias.to(dtype))
    assert torch.equal(codebook_linear(x, *weight, bias), expected)


def test_opcheck_and_gradients():
    weight = weight_of("nf4", 48, 64, 16)
    x = torch.randn(5, 64, generator=generator(1)).requires_grad_()
    bias = torch.zeros(48).requires_grad_()
    torch.library.opcheck(codebook_linear, (x, *weight, bias))
    grad = torch.randn(5, 48, generator=generator(2))
    codebook_linear(x, *weight, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ decoded(*weight, 64))
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_a_large_weight_is_written_by_all_threads():
    weight = weight_of("nf4", 700, 256, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        y = codebook_linear(torch.eye(256), *weight, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y, decoded(*weight, 256).t())


WRONG = {
    "absmax": (lambda w: (w[0], w[1][:, :1], *w[2:]), r"absmax must be float32 \[N, 4\]"),
    "codes": (lambda w: (w[0][:, :8], *w[1:]), "packed must hold 64 codes of 48 rows"),
    "values": (lambda w: (*w[:2], w[2][:8], w[3]), "a codebook of four bits has 16 values"),
}


@pytest.mark.parametrize(("broken", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_an_error(broken, message):
    codebook_linear(torch.ones(1, 64), *weight_of("nf4", 48, 64, 16), None)  # the C++ one is loaded
    with pytest.raises(RuntimeError, match=message):
        codebook_linear(torch.ones(1, 64), *broken(weight_of("nf4", 48, 64, 16)), None)


def test_what_a_gpu_fuses_is_one_operator_on_a_cpu():
    weight = weight_of("nf4", 48, 64, 16)
    assert composed.codebook_linear(torch.randn(5, 64), *weight, None) is NotImplemented
    assert composed.codebook_linear_backward(torch.ones(5, 48), *weight, 64) is NotImplemented
    model = int8fx.quantize_(nn.Linear(64, 48), scheme="nf4")
    _, report = compile_once(model, torch.randn(5, 64))
    assert report.graph.count("int8fx.codebook_linear.default(") == 1
