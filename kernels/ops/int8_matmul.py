"""A product of two activations in int8: attention's QKᵀ and PV.

    y[m, n] = acc_int32[m, n] · left_scale[m] · right_scale[n],   acc_int32 = left_int8 @ right_int8

Both sides are quantised per token, without outliers: a row of Q and of P, and a column of Kᵀ, which is
a row of K. For PV a column of V has a scale, as an output channel of a weight has: rows of V are summed
over, and a scale of each could not be taken out of the sum.

The matrices of a batch are multiplied one by one: one batched product of the same integers in fp32
(exact up to K = 1,040) took 7 ms on two cores where the loop took 3 (QKᵀ of 9 heads, 512 tokens), and
750 where it took 228 (32 heads, 2,048 tokens).

Source: Dettmers et al. 2022, arXiv 2208.07339, section 3.1, with a batch of matrices. The paper leaves
attention in 16-bit.
"""

import torch
from torch import Tensor

from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.quantize_reference import overflow_reason, quantize_reference


def _int8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """The formula above.

    Args:
        left: ``[*, M, K]``, right: ``[*, K, N]``, of one dtype: fp32, bf16 or fp16. What is before
            the last two dimensions broadcasts.

    Returns:
        ``[*, M, N]`` in that dtype.

    Raises:
        ValueError: the sum over K could overflow int32.
    """
    *_, M, K = left.shape
    N = right.shape[-1]
    if reason := overflow_reason(K):
        raise ValueError(f"int8_matmul: {reason}")
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    y = left.new_zeros((*batch, M, N))
    if y.numel() == 0 or K == 0:
        return y
    left_int8, left_scale, _, _ = quantize_reference(left, 0.0, "token")
    right_int8, right_scale, _, _ = quantize_reference(right.mT, 0.0, "token")
    matrices = (
        left_int8.expand(*batch, M, K).reshape(-1, M, K),
        right_int8.expand(*batch, N, K).reshape(-1, N, K),
        left_scale.expand(*batch, M).reshape(-1, M, 1),
        right_scale.expand(*batch, N).reshape(-1, 1, N),
    )
    for out, a, b, a_scale, b_scale in zip(y.view(-1, M, N), *matrices, strict=True):
        out.copy_(torch._int_mm(a, b.t()).to(torch.float32) * a_scale * b_scale)
    return y


def _fake(left: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return left.new_empty((*batch, left.shape[-2], right.shape[-1]))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Straight through the rounding: the gradients of the float product."""
    left, right = ctx.saved_tensors
    return (grad @ right.mT).sum_to_size(left.shape), (left.mT @ grad).sum_to_size(right.shape)


int8_matmul = register(
    "int8_matmul(Tensor left, Tensor right) -> Tensor", _int8_matmul, _fake, _setup, _backward
)
