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
def quantize(regular, x_scale, IS_16_BIT: tl.constexpr):
    """``round(regular / x_scale)`` as int8, with ``x_scale`` broadcast to ``regular``'s shape.

    The default division is approximate, and an exact one takes some fifteen instructions and a branch.
    With the reciprocal r (once a row) one fused step of correction gives the same: q + r · (x - q · s).
    For any x of fp16 or bf16 (IS_16_BIT) below its row's absmax, and scales above 2⁻¹⁰², the rounded
    result is that of the exact quotient: ``tests/gpuless/test_rounding.py`` goes through all of them.
    """
    if IS_16_BIT:
        reciprocal = tl.div_rn(1.0, x_scale)
        quotient = regular * reciprocal
        quotient = tl.fma(tl.fma(-quotient, x_scale, regular), reciprocal, quotient)
    else:
        quotient = tl.div_rn(regular, x_scale)
    # The sum's fraction bits are the integer: its lowest byte is the int8, with no conversion.
    return (quotient + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
