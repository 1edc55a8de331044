"""Weights in int8, activations as they are.

    w8a16         y = x @ w_int8ᵀ · w_scale[n]                       a scale for each channel
    w8a16-group   y = Σ_g x_g @ w_int8_gᵀ · w_scale[n, g]            and for each ``group_size`` of K

The first is LLM.int8()'s outlier product with all of x in it, by the same operators and from the same
packed weights: ``"all"`` is its decomposition, for which a CPU has a product of its own that quantises
nothing (``kernels/cpu/weight_only.h``). The second is a kernel's on a GPU
(``kernels/gpu/grouped_gemm.py``). On a CPU it de-quantises the weight where it is read: Inductor fuses
that into a sum over K for one row of x, and into a pass over the weight before the product of more.

Subnormal x counts, but for bf16 on AVX512-BF16: its instruction takes subnormal operands and sums for
0, so that y is off by up to K · 2^-126 · 128 · w_scale more. A library's product of a group's weights
in 16-bit may do the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.formats.groups import FAMILY, dequantize_groups, grouped
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.gradients import bias_gradient
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.quantize_reference import EVERYTHING
from int8fx.kernels.schemes import int8
from int8fx.kernels.schemes import settings as allowed
from int8fx.kernels.schemes.scheme import Call, Scheme, at_once_by_lists

WHOLE = int8.Outliers(EVERYTHING, "all")


def lower_per_channel(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Any) -> Any:
    return int8.lower(call, x, weight, bias, WHOLE)


def per_channel_at_once(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, settings: Any
) -> Tensor | None:
    return int8.at_once(x, weight, bias, WHOLE)


W8A16 = Scheme(
    "w8a16",
    "x as it is, per-channel w",
    "EETQ (NetEase), optimum-quanto's qint8 weights",
    lambda settings: PER_CHANNEL,
    lower=lower_per_channel,
    quantizer=ops.quantize,
    decompositions=int8.DECOMPOSITIONS,
    operator=table.INT8_LINEAR,
    at_once=per_channel_at_once,
)


# --- by groups ------------------------------------------------------------------------------------


GROUP_LINEAR = "group_linear"  # as the kernel table calls it


def group_linear_reference(x: Tensor, w_int8: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x [*, K] @ ŵᵀ + bias``, of x's dtype; the sums of a single row are fp32."""
    w_hat = dequantize_groups(w_int8, w_scale, x.shape[-1])
    if x.shape.numel() == x.shape[-1]:
        # Not a product but a sum, which Inductor fuses the de-quantisation into: nothing of the
        # weight is written to memory.
        y = (x.reshape(1, -1).to(torch.float32) * w_hat).sum(-1).reshape(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).to(x.dtype)
    return F.linear(x, w_hat.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _fake(x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], w_scale.shape[0])


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, w_scale, bias = inputs
    ctx.save_for_backward(weight, w_scale)
    ctx.K, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    weight, w_scale = ctx.saved_tensors
    grad_x = grad @ dequantize_groups(weight, w_scale, ctx.K).to(grad.dtype)
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, None, grad_bias


group_linear = register(
    "group_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor",
    group_linear_reference,
    _fake,
    _setup,
    _backward,
)


@dataclass(frozen=True)
class Groups:
    """Attributes:
    group_size: how many weights along K share a scale.
    """

    group_size: int = allowed.setting(128, allowed.multiple_of(16))


def lower_groups(call: Call, x: Any, weight: Sequence[Any], bias: Any, settings: Groups) -> Any:
    return call(group_linear, x, *weight, bias)


W8A16_GROUP = Scheme(
    "w8a16-group",
    "x as it is, w by groups of group_size along K",
    "FastChat's compression.py (there 256 weights a group)",
    lambda settings: grouped(settings.group_size),
    Groups,
    lower=lower_groups,
    decompositions={group_linear: group_linear_reference},
    operator=GROUP_LINEAR,
    at_once=at_once_by_lists(GROUP_LINEAR, FAMILY, group_linear, 1, lower_groups),
)
