"""Linears of weights whose four-bit codes name values of a codebook, with x as it is.

    y = x ŵᵀ + bias        ŵ[n, k] = values[code[n, k]] · absmax[n, k // block]

ŵ is computed in fp32, and rounded to x's dtype.

ŵ is written at each call and multiplied by torch's product. On a CPU both are one C++ operator. Its
vectors look 16 values up in one instruction, where Inductor reads a table value by value: at 128 rows
that would take twice as long as the product.

**Gradients** are straight-through: that of x is ``grad @ ŵ``. ŵ is written again for it. It is not kept
from the forward pass, which would hold the whole model in 16-bit.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.codes import unpack_bits
from int8fx.kernels.ops.gradients import bias_gradient
from int8fx.kernels.ops.library import register


def decoded(packed: Tensor, absmax: Tensor, values: Tensor, block: int, K: int) -> Tensor:
    """ŵ ``[N, K]`` fp32; fp64 of an absmax in fp64.

    Args:
        packed: ``[N, bytes]`` uint8, two codes in a byte, the even column in its low half.
        absmax: ``[N, ceil(K / block)]``.
        values: ``[16]`` fp32.
    """
    codes = unpack_bits(packed, 4)[:, : absmax.shape[1] * block]
    steps = values.to(absmax.dtype)[codes.long()].unflatten(1, (-1, block))
    return (steps * absmax.unsqueeze(-1)).flatten(1)[:, :K]


def _load(device_type: str) -> None:
    """A CPU's operators are C++ from the next call on, once any of its kernels is asked for."""
    table.kernel_for(device_type)


def _linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    values: Tensor,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    _load(x.device.type)
    w_hat = decoded(packed, absmax, values, block, x.shape[-1]).to(x.dtype)
    return F.linear(x, w_hat, None if bias is None else bias.to(x.dtype))


def _fake(x: Tensor, packed: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _input_gradient(
    grad: Tensor, packed: Tensor, absmax: Tensor, values: Tensor, block: int, K: int
) -> Tensor:
    return grad @ decoded(packed, absmax, values, block, K).to(grad.dtype)


def _input_gradient_fake(
    grad: Tensor, packed: Tensor, absmax: Tensor, values: Tensor, block: int, K: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], K)


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, packed, absmax, values, ctx.block, bias = inputs
    ctx.save_for_backward(packed, absmax, values)
    ctx.K, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grad_x = codebook_linear_backward(grad, *ctx.saved_tensors, ctx.block, ctx.K)
    grad_bias = None if ctx.bias_dtype is None else bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias


codebook_linear_backward = register(
    "codebook_linear_backward(Tensor grad, Tensor packed, Tensor absmax, Tensor values, int block, "
    "SymInt K) -> Tensor",
    _input_gradient,
    _input_gradient_fake,
)
codebook_linear = register(
    "codebook_linear(Tensor x, Tensor packed, Tensor absmax, Tensor values, int block, Tensor? bias) "
    "-> Tensor",
    _linear,
    _fake,
    _setup,
    _backward,
)
