"""Outliers as int8: three digits of base 254, each with a scale for its row.

    x_outlier ≈ d1 · s + d2 · s / 254 + d3 · s / 254²,        s = absmax / 127

exact to 2⁻²³ of the row's largest outlier, where fp16 keeps 2⁻¹¹ of each and a sum in fp32 cannot
keep more. So the outlier product is three more rows of the int8 product::

    x_outlier[m] @ w_int8ᵀ  =  Σ_i  scale_i[m] · (digits_i[m] @ w_int8ᵀ)

A matrix instruction has at least 16 rows and a decode step of one token fills one of them: outliers
cost the decode kernel no branch, no conversion of weights and no second product. The digits are
pointwise from ``x``, so whatever computes ``x`` computes them too.
"""

import torch
from torch import Tensor

from int8fx.kernels.quantize import MIN_SCALE, QMAX

DIGITS = 3
BASE = 2.0 * QMAX
# No scale is below the smallest normal number, whose quotients a GPU may flush to 0 / 0.
_MIN = MIN_SCALE * BASE ** (DIGITS - 1)


def outlier_digits(x_outlier: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The digits of ``x_outlier [M, K]``, each ``[M, K]`` int8, and their scales, each ``[M]`` fp32.

    In operators that Inductor fuses with whatever computes ``x``. An infinity is the first digit ±127
    under an infinite scale, and its row has no other digits: a product with it is what a float
    product would be.
    """
    rest = x_outlier.to(torch.float32)
    scale = (rest.abs().amax(-1) / QMAX).clamp_min(_MIN)
    digits, scales = [], []
    for _ in range(DIGITS):
        steps = torch.where(rest.isinf(), rest.sign() * QMAX, torch.round(rest / scale.unsqueeze(-1)))
        digits.append(steps.to(torch.int8))
        scales.append(scale)
        rest = rest - steps * scale.unsqueeze(-1)
        # Under an infinite scale nothing is left to say: inf - inf and 0 · inf are NaN.
        rest = torch.where(rest.isnan(), 0.0, rest)
        scale = torch.where(scale.isinf(), _MIN, scale) / BASE
    return digits, scales
