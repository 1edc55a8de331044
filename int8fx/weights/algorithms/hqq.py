"""HQQ: zero points that make the error sparse, found without data.

    min over zero   ||W - Ŵ||_p^p,   p = 0.7,   Ŵ = (code - zero) · scale

solved by halves: with an auxiliary W_e for the error,

    W_e  = shrink(W - Ŵ)         sign(e) · max(0, |e| - |e|^(p - 1) / beta)
    zero = mean over the group of code - (W - W_e) / scale

and beta growing. The zero point is a float, and the scale stays what the range of the group says.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
(Mobius Labs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.clip import codes_on, grid_of, stored_grid, values_on
from int8fx.weights.algorithms.grid import Codes, Grid

NORM, BETA, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20
MOST_ZERO = 2.0**14  # of a zero point; fp16 ends at 2**16


def hqq(weight: Tensor, grid: Grid) -> Codes:
    """The codes of ``weight [N, K]`` fp32, for zero points in float."""
    K = weight.shape[1]
    width = grid.width(K)
    groups = F.pad(weight, (0, -K % width)).unflatten(1, (-1, width))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    # A group far from zero has a zero point beyond its codes, as it is a float.
    scale, _ = grid_of(low, high, grid.bits, grid.zeros, grid.dtype)
    # Of weights that are nearly alike it would be beyond the largest float of the dtype.
    farthest = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum(scale, farthest / MOST_ZERO).to(grid.dtype).float()
    zero = -low / scale
    best, least, beta = zero, torch.full_like(zero, torch.inf), BETA
    for _ in range(ITERATIONS):
        rounded = zero.to(grid.dtype).float()
        codes = codes_on(groups, (scale, rounded), grid.bits)
        error = groups - values_on(codes, (scale, rounded))
        size = error.abs().pow(NORM).mean(-1, keepdim=True)
        better = size < least
        best, least = torch.where(better, rounded, best), torch.where(better, size, least)
        zero = (codes - (groups - shrink(error, beta)) / scale).mean(-1, keepdim=True)
        beta *= GROWTH
    codes = codes_on(groups, (scale, best), grid.bits).to(torch.uint8).flatten(1)[:, :K]
    return Codes(codes, stored_grid(scale, best, grid.bits, grid.zeros, grid.dtype))


def shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal step of the norm: small errors become 0, large ones stay."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(2.0**-60).pow(NORM - 1) / beta).clamp_min(0)
