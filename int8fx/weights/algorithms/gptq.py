"""GPTQ: column by column, each column's rounding error is made up for by those that follow.

    H = Xᵀ X / rows,   U the upper Cholesky factor of (H + damping)⁻¹
    error = (w_k - ŵ_k) / U_kk,   w_j -= error · U_kj   for every column j after k

With act-order columns are taken in the order of their H_kk, the largest first, while the most are left
to make up for them. A group's scale and zero point are chosen when its first column is reached, of the
weights as they are then.

Source: Frantar et al. 2022, arXiv 2210.17323, algorithm 1.
"""

import torch
from torch import Tensor

from int8fx.kernels.formats.clip import codes_on, grid_of_groups, stored_grid, values_on
from int8fx.weights.algorithms.grid import Codes, Grid

DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
COLUMNS_AT_ONCE = 128  # whose errors reach the columns behind them in one product


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Codes:
    """The codes of ``weight [N, K]`` fp32.

    Args:
        hessian: ``[K, K]`` fp32, the mean of x xᵀ over rows.
    """
    K, order = weight.shape[1], None
    if grid.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    weight, factor = weight.clone(), _factor(hessian)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    width, grids = grid.width(K), []
    for start in range(0, K, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, K)
        errors = torch.empty_like(weight[:, start:end])
        for k in range(start, end):
            if k % width == 0:
                # Columns of the group behind this block lack its errors so far.
                ahead = weight[:, k : min(k + width, K)].clone()
                ahead[:, end - k :] -= errors[:, : k - start] @ factor[start:k, end : k + width]
                grids.append(grid_of_groups(ahead.unsqueeze(1), grid.bits, grid.zeros, grid.dtype))
            scale, zero = (part.squeeze(1) for part in grids[-1])
            column = weight[:, k : k + 1]
            code = codes_on(column, (scale, zero), grid.bits)
            codes[:, k : k + 1] = code.to(torch.uint8)
            error = (column - values_on(code, (scale, zero))) / factor[k, k]
            weight[:, k:end] -= error * factor[k, k:end]
            errors[:, k - start : k - start + 1] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    scale, zero = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    parts = stored_grid(scale, zero, grid.bits, grid.zeros, grid.dtype)
    return Codes(codes, parts, None if order is None else order.to(torch.int32))


def _factor(hessian: Tensor) -> Tensor:
    """U of the formula; columns that no row has are as those of the others' mean."""
    H = hessian.double()
    diagonal = H.diagonal()
    mean = diagonal.mean() if diagonal.any() else torch.ones((), dtype=H.dtype, device=H.device)
    H = H + torch.diag(torch.where(diagonal == 0, mean, DAMPING * mean))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True).float()
