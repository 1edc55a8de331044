"""The rotation of ``kernels/ops/rotation.py`` on values in registers, bit for bit.

    rotated(x)[i] = 2**-⌊log2(SIZE) / 2⌋ · Σ_j (-1)^popcount(i & j) · sign[j] · x[j]      in each block

Every butterfly is one addition or subtraction of two values, in the reference's order of strides, and
a product with plus or minus a power of two is exact. So no fused multiply-add can change a bit.

Three strides at a time are of eight neighbours, which a thread holds. In between, the values change
places: those that are 8 (64) apart become neighbours. The compiler sends them through shuffles where
a block lies in a warp.
"""

import triton
import triton.language as tl

from int8fx.kernels.ops.rotation import RANDOM_BITS

_WORD0 = tl.constexpr(RANDOM_BITS[0])
_WORD1 = tl.constexpr(RANDOM_BITS[1])
_WORD2 = tl.constexpr(RANDOM_BITS[2])
_WORD3 = tl.constexpr(RANDOM_BITS[3])


@triton.jit
def _is_negative(k, SIZE: tl.constexpr, RANDOM: tl.constexpr):
    """1 for the columns ``k`` whose sign is -1, else 0."""
    j = k & (SIZE - 1)
    if RANDOM:
        word = tl.full(j.shape, _WORD0, tl.uint64)
        if SIZE > 64:
            word = tl.where((j & 64) != 0, tl.full(j.shape, _WORD1, tl.uint64), word)
        if SIZE > 128:
            upper = tl.full(j.shape, _WORD2, tl.uint64)
            upper = tl.where((j & 64) != 0, tl.full(j.shape, _WORD3, tl.uint64), upper)
            word = tl.where((j & 128) != 0, upper, word)
        return ((word >> (j & 63).to(tl.uint64)) & 1).to(tl.int32)
    else:
        # Of pairs of bits those that are 3, and whether their number is odd.
        threes = j & (j >> 1) & 0x55
        threes ^= threes >> 4
        return (threes ^ (threes >> 2)) & 1


@triton.jit
def signs_of_columns(k, SIZE: tl.constexpr, RANDOM: tl.constexpr):
    """The signs of the columns ``k``, times the factor of x: plus or minus a power of two."""
    HALF: tl.constexpr = 4 if SIZE < 64 else 8 if SIZE < 256 else 16
    return tl.where(_is_negative(k, SIZE, RANDOM) != 0, -1.0 / HALF, 1.0 / HALF)


@triton.jit
def _butterflies(x):
    """The sums of all strides of ``x [rows, n]``, in its last dimension.

    Neighbours are split first: in either half, what is next to each other then is two apart in x.
    """
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if N == 1:
        return x
    else:
        low, high = tl.split(tl.reshape(x, (ROWS, N // 2, 2)))
        return tl.reshape(tl.join(_butterflies(low + high), _butterflies(low - high)), (ROWS, N))


@triton.jit
def butterflies_from(x, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """The sums of the strides from STRIDE to SIZE / 2, of ``x [n / 8, 8]``, whose order it keeps."""
    if STRIDE >= SIZE:
        return x
    else:
        N: tl.constexpr = x.shape[0] * x.shape[1]
        DIGIT: tl.constexpr = 8 if SIZE // STRIDE >= 8 else SIZE // STRIDE
        UPPER: tl.constexpr = N // (STRIDE * DIGIT)
        if STRIDE == 1:
            done = _butterflies(tl.reshape(x, (N // DIGIT, DIGIT)))
        else:
            apart = tl.permute(tl.reshape(x, (UPPER, DIGIT, STRIDE)), (0, 2, 1))
            done = _butterflies(tl.reshape(apart, (N // DIGIT, DIGIT)))
            done = tl.permute(tl.reshape(done, (UPPER, STRIDE, DIGIT)), (0, 2, 1))
        return butterflies_from(tl.reshape(done, (x.shape[0], x.shape[1])), STRIDE * DIGIT, SIZE)


@triton.jit
def rotated_chunk(x, k, SIZE: tl.constexpr, RANDOM: tl.constexpr):
    """``rotated`` of a chunk of whole blocks, ``x [n / 8, 8]`` at columns ``k``, in fp32."""
    return butterflies_from(x.to(tl.float32) * signs_of_columns(k, SIZE, RANDOM), 1, SIZE)
