"""Quantising on a GPU: in our kernels, and in operators that Inductor fuses with what computes x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from int8fx.kernels.gpu.launch import empty
from int8fx.kernels.ops import quantize_reference as reference

# Written as a decimal: Inductor copies constants into its output as they print.
MIN_SCALE = tl.constexpr(1.1754943508222875e-38)
# fp32 has no fraction bits left at 1.5 * 2**23, so adding and subtracting it rounds half to even.
_ROUND = tl.constexpr(12582912.0)


def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """``kernels/ops/quantize_reference.py``'s token decomposition, in fewer instructions of Inductor's
    kernel.

    - The maximum is taken of the bits, as integers: of floats Inductor's takes four instructions,
      since it looks for NaN, which as an integer is larger than all others.
    - One division a row, where Inductor's takes seven instructions an element. x · fl(1 / s) is off
      x / s by 127 · 2⁻²³ at most: of elements that close to a tie some round to the other side.
    - 1.5 · 2²³ rounds, and leaves the integer in the lowest byte.

    Args:
        x: ``[M, K]``, fp32, bf16 or fp16.
        threshold: 0 means no decomposition.

    Returns:
        ``x_int8 [M, K]``, ``x_scale [M]`` fp32, and ``x_outlier [M, K]``, empty with threshold 0.
    """
    regular, x_outlier, _ = reference.split_outliers(x, threshold, "token")
    absmax = regular.abs().view(torch.int32).amax(-1).view(torch.float32)
    x_scale = (absmax / reference.QMAX).clamp_min(reference.MIN_SCALE)
    quotient = regular * (1.0 / x_scale).unsqueeze(-1)
    return (quotient + _ROUND.value).view(torch.int32).to(torch.int8), x_scale, x_outlier


def int8_rows(x: Tensor, threshold: float, decomposition: str) -> tuple[Tensor, Tensor, Tensor, bool]:
    """``x_int8, x_scale``, where outliers are read, and whether Inductor quantises; else our kernel
    fills the first two."""
    if threshold == 0 or decomposition == "token":
        return *quantize_rows(x, threshold), True
    M, K = x.shape
    return empty(x, (M, K), torch.int8), empty(x, (M,), torch.float32), x, False


@triton.jit
def folded(x, VECTOR: tl.constexpr):
    """The largest of each VECTOR neighbours of a row, in the thread that has them; NaN stays NaN."""
    if VECTOR == 1:
        return x
    else:
        ROWS: tl.constexpr = x.shape[0]
        COLUMNS: tl.constexpr = x.shape[1]
        HALF: tl.constexpr = VECTOR // 2
        # Halves of a vector, not neighbours: two of 16 bits share a register.
        halves = tl.permute(tl.reshape(x, (ROWS, COLUMNS // VECTOR, 2, HALF)), (0, 1, 3, 2))
        left, right = tl.split(halves)
        larger = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
        return folded(tl.reshape(larger, (ROWS, COLUMNS // 2)), HALF)


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
def reciprocal_int8(regular, x_scale):
    """``round(regular · fl(1 / x_scale))`` as int8, as ``quantize_rows`` has it."""
    quotient = regular * tl.div_rn(1.0, x_scale)
    return (quotient + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize(regular, x_scale, IS_16_BIT: tl.constexpr):
    """``round(regular / x_scale)`` as int8, bit for bit as the reference does it.

    ``x_scale`` is broadcast to ``regular``'s shape.

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


@triton.jit
def corrected_int8(values, x_scale, EXACT: tl.constexpr):
    """``round(values / x_scale)`` as int8, of one row in fp32, bit for bit as the reference does it.

    Of a quotient that is a unit in the last place off, one fused step of correction with the rounded
    reciprocal is the rounded quotient (Markstein 1990); a first such step makes it so close. That needs
    remainders above the smallest numbers: scales above 2⁻¹⁰². Below, a tie may round to the other side.
    With EXACT the division is the hardware's, whatever the scale.

    Finite values under an infinite scale are 0.
    """
    if EXACT:
        quotient = tl.div_rn(values, x_scale)
    else:
        is_infinite = x_scale == float("inf")
        reciprocal = tl.where(is_infinite, 0.0, tl.div_rn(1.0, x_scale))
        step = tl.where(is_infinite, 0.0, x_scale)
        quotient = values * reciprocal
        quotient = tl.fma(tl.fma(-quotient, step, values), reciprocal, quotient)
        quotient = tl.fma(tl.fma(-quotient, step, values), reciprocal, quotient)
    return (quotient + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
