"""Gradients of int8 linears: straight-through, with ŵ = w_int8 · w_scale."""

from collections.abc import Sequence

import torch
from torch import Tensor


def input_gradient(grad: Tensor, weight: Tensor, w_scale: Tensor, K: int) -> Tensor:
    N = w_scale.shape[0]
    w_int8 = weight if weight.shape == (N, K) else torch.ops.int8fx.unpack_weight(weight, N, K)
    return grad @ (w_int8.to(torch.float32) * w_scale.unsqueeze(1)).to(grad.dtype)


def bias_gradient(grad: Tensor, bias_dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(bias_dtype)


def linears_setup(ctx, inputs, output) -> None:
    x, _, _, weights, w_scales, biases = inputs
    ctx.save_for_backward(*weights, *w_scales)
    ctx.K = x.shape[-1]
    ctx.bias_dtypes = [bias.dtype for bias in biases]


def linears_backward(ctx, grads: Sequence[Tensor]) -> tuple:
    """Of any operator with the arguments of ``int8_linears``."""
    saved = ctx.saved_tensors  # may be asked for once: gradient checkpointing computes it again then
    count = len(saved) // 2
    weights, w_scales = saved[:count], saved[count:]
    grad_x = sum(
        input_gradient(grad, weight, w_scale, ctx.K)
        for grad, weight, w_scale in zip(grads, weights, w_scales, strict=True)
    )
    grad_biases = [
        bias_gradient(grad, dtype) for grad, dtype in zip(grads, ctx.bias_dtypes, strict=False)
    ]
    return grad_x, None, None, [None] * count, [None] * count, grad_biases
