"""AWQ: columns that meet large activations are made larger before they are rounded.

    y = (x · c) @ Q(W / c)ᵀ,   c[k] = rms(x[:, k])^-alpha, normalised

alpha is searched from 0 to 1 for the least error of the output, (W - Ŵ) H (W - Ŵ)ᵀ summed up. A larger
weight has the same step, and so a smaller share of error; c takes it back in x. At alpha 0 it is
round-to-nearest.

The paper folds c into the operator before the linear. Here the linear has it, for any model.

Source: Lin et al. 2023, arXiv 2306.00978, section 3.2.
"""

import torch
from torch import Tensor

from int8fx.kernels.formats.clip import quantize_groups
from int8fx.kernels.formats.grouped import dequantize_codes
from int8fx.weights.algorithms.grid import Codes, Grid

STEPS = 20  # of alpha


def awq(weight: Tensor, hessian: Tensor, grid: Grid) -> Codes:
    """The codes of ``weight [N, K]`` fp32.

    Args:
        hessian: ``[K, K]`` fp32, the mean of x xᵀ over rows.
    """
    size = hessian.diagonal().sqrt()
    size = size / size.amax().clamp_min(2.0**-60)
    best, least = None, torch.inf
    for step in range(STEPS):
        column_scale = _column_scale(size, step / STEPS, grid.dtype)
        codes, *parts = _quantized(weight, column_scale, grid)
        error = weight - _dequantized(codes, parts, grid, weight.shape[1]) * column_scale.float()
        loss = float((error @ hessian * error).sum())
        if best is None or loss < least:
            best, least = Codes(codes[:, : weight.shape[1]], parts, None, column_scale), loss
    assert best is not None
    return best


def _column_scale(size: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    scale = size.clamp_min(1e-4).pow(-alpha)
    # The middle of its range is 1, so that scales of groups stay where their dtype is fine.
    return (scale / (scale.amax() * scale.amin()).sqrt()).to(dtype)


def _quantized(weight: Tensor, column_scale: Tensor, grid: Grid) -> list[Tensor]:
    scaled = weight / column_scale.float()
    return quantize_groups(scaled, grid.bits, grid.group, grid.zeros, grid.dtype)


def _dequantized(codes: Tensor, parts: list[Tensor], grid: Grid, K: int) -> Tensor:
    return dequantize_codes(codes, grid.bits, grid.group, grid.zeros, parts, K)
