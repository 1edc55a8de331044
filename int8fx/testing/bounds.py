"""The error bound of LLM.int8(), derived from the scales alone.

With x̂ = x_int8 · x_scale + x_outlier and ŵ = w_int8 · w_scale, the exact y = Σ x w and the exact
ŷ = Σ x̂ ŵ differ by at most

    Σ_k |x̂ - x| |ŵ| + |x| |ŵ - w|  <=  x_scale / 2 · Σ_{k regular} |ŵ|  +  w_scale / 2 · Σ_k |x|

What is computed differs from ŷ by fp32 round-off in the outlier product and the epilogue, and by the
rounding of the result to its dtype.
"""

import torch
from torch import Tensor

from int8fx.kernels.ops.quantize_reference import quantize_reference, quantize_weight

# Half a step, and the fp32 division before the rounding: 127 steps of relative error 2**-24.
HALF = 0.5 + 127 * 2.0**-23
FP32 = 2.0**-24


def expected_and_bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float,
    decomposition: str,
) -> tuple[Tensor, Tensor]:
    """The float64 result ``[*, N]``, and by how much LLM.int8() in x's dtype may differ from it."""
    w_int8, w_scale = quantize_weight(weight)
    x_int8, x_scale, x_outlier, _ = quantize_reference(x, threshold, decomposition)
    x64, w64 = x.double(), weight.double()
    w_hat = w_int8.double() * w_scale.double().unsqueeze(1)
    expected = x64 @ w64.t()
    if bias is not None:
        expected = expected + bias.double()

    regular = torch.ones_like(x64)
    outlier = torch.zeros_like(x64)
    if threshold != 0:
        outlier = x_outlier.double().abs()
        regular = (outlier == 0).double()
    round_off = x_scale.double().unsqueeze(-1) * HALF * (regular @ w_hat.abs().t())
    round_off += w_scale.double() * HALF * x64.abs().sum(-1, keepdim=True)

    magnitude = (x_int8.double().abs() * x_scale.double().unsqueeze(-1)) @ w_hat.abs().t()
    magnitude += outlier @ w_hat.abs().t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    # One rounding a term of the outlier sum, and at most eight in the epilogue.
    arithmetic = FP32 * (x.shape[-1] + 8) * magnitude
    info = torch.finfo(x.dtype)
    rounding = info.eps * (expected.abs() + round_off + arithmetic) + info.smallest_normal
    return expected, round_off + arithmetic + rounding


def attention_bound(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Of ``|int8fx.attention - float64's|``: round-off of scores and sums in fp32, and of y.

    A score is a sum of D products, off by D eps |q| |k| at most; e^x turns that into a relative error
    of every weight, and of their sum. The exponential and the sums over keys add eps for each step;
    scores are rounded again when their maximum is taken away, |score| eps.
    """
    eps = torch.finfo(torch.float32).eps
    dtype, D, L = q.dtype, q.shape[3], k.shape[2]
    size = q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * scale
    relative = 2 * ((D + 8) * size + L + 16) * eps + torch.finfo(dtype).eps
    return float(relative * v.double().abs().max()) + torch.finfo(dtype).smallest_normal
