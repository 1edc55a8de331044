"""Quantising inside a kernel, bit for bit as ``kernels/quantize.py`` does it."""

import triton
import triton.language as tl

# Written as a decimal: Inductor copies constants into its output as they print.
MIN_SCALE = tl.constexpr(1.1754943508222875e-38)
# fp32 has no fraction bits left at 1.5 * 2**23, so adding and subtracting it rounds half to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def scale_of_rows(absmax):
    """``x_scale [M]`` of partial maxima ``[M, any]``.

    A NaN among them makes its row's scale NaN, as in the reference: ``tl.max`` alone skips NaN, and
    the row would come out finite and meaningless.
    """
    has_nan = tl.max((absmax != absmax).to(tl.int32), 1) != 0
    scale = tl.maximum(tl.div_rn(tl.max(absmax, 1), 127.0), MIN_SCALE)
    return tl.where(has_nan, float("nan"), scale)


@triton.jit
def quantize(regular, x_scale):
    """``round(regular / x_scale)`` as int8. ``div_rn``: the default division is approximate."""
    return ((tl.div_rn(regular, x_scale) + _ROUND) - _ROUND).to(tl.int8)
