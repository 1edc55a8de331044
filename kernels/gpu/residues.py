"""Outliers as int8: three residues to the base 254, with a scale for each row.

    x_outlier ≈ (r0 + r1 / 254 + r2 / 254²) · s,        s = absmax / 127

Each residue is what rounding to the steps of the residue before left over, in steps 254 times finer.
The sum is exact to 2⁻²³ of the row's largest outlier, where fp16 keeps 2⁻¹¹ of each and a sum in fp32
cannot keep more. So the outlier product is three more rows of the int8 product::

    x_outlier[m] @ w_int8ᵀ  =  Σ_i  s[m] / 254^i · (r_i[m] @ w_int8ᵀ)

A matrix instruction has at least 16 rows and a decode step of one token fills one of them: outliers
cost the decode kernel no branch, no conversion of weights and no second product. The residues are
pointwise from ``x``, so whatever computes ``x`` computes them too. They stay separate tensors: Inductor
may give a concatenation a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.ops.quantize_reference import MIN_SCALE, QMAX

RESIDUES = 3
BASE = 2.0 * QMAX
# No scale is below the smallest normal number, whose quotients a GPU may flush to 0 / 0.
_MIN = MIN_SCALE * BASE ** (RESIDUES - 1)


def outlier_residues(x_outlier: Tensor) -> tuple[list[Tensor], Tensor]:
    """The residues of ``x_outlier [M, K]``, each ``[M, K]`` int8, and ``s [M]`` fp32.

    In operators that Inductor fuses with whatever computes ``x``. An infinity is the first residue ±127
    under an infinite scale, and its row has no other residues: a product with it is what a float
    product would be.
    """
    rest = x_outlier.to(torch.float32)
    first = scale = (rest.abs().amax(-1) / QMAX).clamp_min(_MIN)
    residues = []
    for _ in range(RESIDUES):
        steps = torch.where(rest.isinf(), rest.sign() * QMAX, torch.round(rest / scale.unsqueeze(-1)))
        residues.append(steps.to(torch.int8))
        rest = rest - steps * scale.unsqueeze(-1)
        # Under an infinite scale nothing is left to say: inf - inf and 0 · inf are NaN.
        rest = torch.where(rest.isnan(), 0.0, rest)
        scale = torch.where(scale.isinf(), _MIN, scale) / BASE
    return residues, first


def residues_reference(residues: list[Tensor], scale: Tensor) -> Tensor:
    """``x_outlier [M, K]`` of its residues, in float64."""
    x_outlier = torch.zeros(residues[0].shape, dtype=torch.float64)
    for index, residue in enumerate(residues):
        step = scale.double().unsqueeze(-1) / BASE**index
        x_outlier += torch.where(residue == 0, 0.0, residue.double() * step)  # 0 · inf would be NaN
    return x_outlier


@triton.jit
def scale_of_residue(scale, residue):
    """``s / 254^residue``; 0 below an infinity, where residues are 0 and 0 · inf would be NaN."""
    below = tl.where(residue == 1, scale / 254.0, scale / 64516.0)
    return tl.where(residue <= 0, scale, tl.where(scale == float("inf"), 0.0, below))
