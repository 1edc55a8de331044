"""Inductor's own options through ``options={"inductor": ...}``: none of them ends the process."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import int8fx
from int8fx import torch_private
from int8fx.kernels.ops import int8_linear as ops
from int8fx.testing.support import Mlp, compile_once

# In a process of its own: a fault would end this one.
CODE = """
import sys, torch
from torch import nn
import torch.nn.functional as F
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.o = nn.RMSNorm(64), nn.Linear(64, 192), nn.Linear(64, 64, bias=False)
        self.up, self.gate, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
    def forward(self, x):
        heads = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))
torch.manual_seed(0)
options, mode = eval(sys.argv[1]), eval(sys.argv[2])
model = Block().eval().requires_grad_(False)
x = torch.randn(1, 40, 64)
run = torch.compile(model, backend="llmint8", options=options, mode=mode)
run(x)
print("error", ((run(x) - model(x)).norm() / model(x).norm()).item())
"""


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"inductor": {"cpp_wrapper": True}}, None),
        ({"scheme": "w8a16", "inductor": {"cpp_wrapper": True}}, None),
        ({"scheme": "int8-rotated", "inductor": {"cpp_wrapper": True}}, None),
        ({"inductor": {"freezing": True}}, None),
        ({"inductor": {"triton.cudagraphs": True}}, None),
        ({"inductor": {"cpp.enable_kernel_profile": True, "cpp.threads": 1}}, None),
        (None, "max-autotune"),
        (None, "reduce-overhead"),
    ],
    ids=str,
)
def test_a_decoder_layer_under_it(options, mode):
    command = [sys.executable, "-c", CODE, repr(options), repr(mode)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < float(done.stdout.split()[-1]) < 0.02


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_a_single_linear_is_no_list_under_cpp_wrapper(cpp_wrapper):
    model, x = Mlp(32, 24).requires_grad_(False), torch.randn(5, 32)
    y, report = compile_once(model, x, backend_options={"inductor": {"cpp_wrapper": cpp_wrapper}})
    assert report.graph.count("int8fx.int8_linears.single") == (2 if cpp_wrapper else 0)
    assert report.graph.count("int8fx.int8_linears.default") == (0 if cpp_wrapper else 2)
    assert (y - model(x)).norm() / model(x).norm() < 0.02


def test_the_single_linear_is_the_list_of_one():
    linear, x = nn.Linear(32, 24), torch.randn(5, 32, requires_grad=True)
    weight = int8fx.quantize_(nn.Sequential(linear))[0].weight
    for bias in (None, linear.bias):
        biases = [] if bias is None else [bias]
        rest = (6.0, "column")
        (expected,) = ops.int8_linears(x, *rest, [weight.packed], [weight.w_scale], biases)
        y = ops.single_int8_linear(x, *rest, weight.packed, weight.w_scale, bias)
        assert torch.equal(y, expected)
        inputs = [x, *biases]
        wanted = torch.autograd.grad(expected.square().sum(), inputs)
        for left, right in zip(torch.autograd.grad(y.square().sum(), inputs), wanted, strict=True):
            assert torch.equal(left, right)


def test_what_decides_is_the_configuration_in_effect():
    from torch._inductor import config

    assert torch_private.writes_cpp_wrapper({"cpp_wrapper": True})
    with config.patch(cpp_wrapper=True):
        assert torch_private.writes_cpp_wrapper({})
        assert not torch_private.writes_cpp_wrapper({"cpp_wrapper": False})
