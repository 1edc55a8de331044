"""Quantise: vector-wise int8 for activations and weights, with LLM.int8()'s outlier decomposition.

    absmax[m]   = max |x[m, k]|  over the regular elements of row m
    x_scale[m]  = max(absmax[m] / 127, 2**-126)
    x_int8      = round(x / x_scale), 0 where x is an outlier
    x_outlier   = x where x is an outlier, else 0
    x           ≈ x_int8 · x_scale + x_outlier,   |error| <= x_scale / 2

Source: Dettmers et al. 2022, "LLM.int8()", sections 3.1 and 3.2.
"""

import torch
from torch import Tensor

QMAX = 127
# A scale below the smallest normal float would lose bits itself (and a zero row would divide by
# zero), so scales stop here; |x - x_int8 * x_scale| <= x_scale / 2 then holds for every finite row.
MIN_SCALE = 2.0**-126
# 127 times a larger scale rounds to infinity, though the weight that it is of is finite.
MAX_SCALE = (2 - 2.0**-22) * 2.0**127 / QMAX
# int32 holds a sum of K products of at most 127 * 127 each.
MAX_K = (2**31 - 1) // (QMAX * QMAX)

_ELEMENTS_AT_ONCE = 2**20

DECOMPOSITIONS = ("column", "token")
# The smallest normal fp32: no element that is not zero (or denormal) is below it.
EVERYTHING = 2.0**-126


def overflow_reason(K: int) -> str:
    """Why a sum over K does not fit, or empty."""
    return f"K = {K} could overflow an int32 sum (at most {MAX_K})" if K > MAX_K else ""


def quantize_reference(
    x: Tensor, threshold: float, decomposition: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row-wise int8 of ``x`` with its outliers taken out, in plain PyTorch.

    This is also what Inductor is given to fuse with whatever produced ``x``.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        threshold: an element is an outlier when ``|x| >= threshold``; 0 means no decomposition.
        decomposition: ``"column"`` takes out a whole column that holds an outlier in any row (the
            paper's); ``"token"`` takes out the outlier elements alone, so that a row's result does
            not depend on the rows beside it. With ``"all"`` everything is an outlier, whatever the
            threshold: what schemes that quantise weights only ask for.

    Returns:
        ``x_int8 [*, K]`` int8, ``x_scale [*]`` fp32, ``x_outlier [*, K]`` of x's dtype and
        ``outlier_columns [K]`` bool, the columns in which ``x_outlier`` may be non-zero. With
        threshold 0 the last two are empty (``[0]``).

    A NaN is never an outlier by itself (``|NaN| >= t`` is false): it makes its row's scale NaN, and
    so every output of that row, as in a float product. An infinity is an outlier, and meets the
    weight in the 16-bit product; without decomposition it makes its row's scale infinite.
    """
    regular, x_outlier, outlier_columns = split_outliers(x, threshold, decomposition)
    x_scale = _scale(regular)
    x_int8 = torch.round(regular / x_scale.unsqueeze(-1)).to(torch.int8)
    return x_int8, x_scale, x_outlier, outlier_columns


def split_outliers(x: Tensor, threshold: float, decomposition: str) -> tuple[Tensor, Tensor, Tensor]:
    """``regular [*, K]`` fp32, 0 at outliers, and ``x_outlier`` and ``outlier_columns`` as above."""
    regular = x.to(torch.float32)
    if threshold == 0:
        return regular, x.new_empty(0), x.new_empty(0, dtype=torch.bool)
    if decomposition == "all":
        return torch.zeros_like(regular), x.clone(), x.new_ones(x.shape[-1], dtype=torch.bool)
    outlier = regular.abs() >= threshold
    outlier_columns = outlier.reshape(-1, x.shape[-1]).any(0)
    taken = outlier_columns if decomposition == "column" else outlier
    return torch.where(taken, 0.0, regular), torch.where(taken, x, 0), outlier_columns


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per-output-channel int8 of a weight.

    Args:
        weight: ``[N, K]``, or ``[E, N, K]`` of experts; any floating dtype, K >= 1.

    Returns:
        ``w_int8`` of the weight's shape, int8, contiguous, and ``w_scale [N]`` or ``[E, N]`` fp32;
        weight ≈ w_int8 · w_scale.
    """
    weight = weight.detach()
    if weight.dim() == 3:
        quantized = [quantize_weight(matrix) for matrix in weight]
        return torch.stack([pair[0] for pair in quantized]), torch.stack(
            [pair[1] for pair in quantized]
        )
    w_int8 = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    w_scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    # Some rows at a time: a large weight in fp32, several times over, is what a peak is made of.
    step = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        values = weight[rows].to(torch.float32)
        scale = weight_scale(values)
        w_scale[rows] = scale
        w_int8[rows] = torch.round(values / scale.unsqueeze(-1)).to(torch.int8)
    return w_int8, w_scale


def weight_scale(rows: Tensor) -> Tensor:
    """``[*]`` fp32 of ``rows [*, K]``: 127 times it is finite where the row is."""
    scale = _scale(rows)
    return torch.where(scale.isinf(), scale, scale.clamp_max(MAX_SCALE))


def _scale(rows: Tensor) -> Tensor:
    return (rows.abs().amax(-1) / QMAX).clamp_min(MIN_SCALE)
