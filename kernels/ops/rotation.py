"""Block Hadamard rotation: spreads what is large in a few columns over the columns beside them.

    rotate(x)[..., i] = 2**-⌊log2(block) / 2⌋ · Σ_j (-1)^popcount(i & j) · sign[j] · x[..., j]

for ``i`` and ``j`` in one block of columns. With S the Sylvester matrix of a block of n columns and D
the diagonal of signs, ``(x D S)(w D S)ᵀ = n · x wᵀ``. So the product of a rotated x and a rotated
weight is that of the two before, once the weight has the other part of 1 / n (``rotate_weight``). Both
factors are powers of two, and cost no rounding.

| rotation | sign[j] | so the matrix is, up to order and sign of its rows |
|---|---|---|
| ``hadamard`` | -1 for an odd number of digits 3 in base 4 | the regular Hadamard matrix |
| ``random-signs`` | fixed random bits | Sylvester's with random signs |
| ``convrot`` | as ``hadamard`` | that of ConvRot's files; blocks are powers of 4 |

The regular Hadamard matrix is the Kronecker power of ``[[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]]``.
That factor is Sylvester's of 4 with its last column negated, its rows in another order and the last
of them negated. Order and sign of a rotated row's elements change neither its scale nor, as the weight
has the same, any product: integers and sums are the same.

The sum is made by butterflies, of strides 1, 2, 4, ..., block / 2 in this order, in fp32. Every kernel
adds in this order, so all of them have the same bits. Each of the log2(block) additions rounds once:

    |computed - exact| <= log2(block) · 2**-24 · 2**-⌊log2(block) / 2⌋ · Σ_j |x[..., j]|   (first order)

Sources: QuaRot (arXiv 2404.00456); the regular matrix, which has no row of ones to gather a constant
offset, from ConvRot (arXiv 2512.03673).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATIONS = ("hadamard", "random-signs", "convrot")
NONE = "none"  # of operators whose rows are not rotated
LEAST_BLOCK, LARGEST_BLOCK = 16, 256
# Bit j % 64 of word j // 64: whether sign[j] is -1. Four words of random.Random(0).getrandbits(64).
RANDOM_BITS = (
    0x629F6FBED82C07CD,
    0xE3E70682C2094CAC,
    0x0A5D2F346BAA9455,
    0xF728B4FA42485E3A,
)


def allowed_blocks(rotation: str) -> tuple[int, ...]:
    """The sizes of a block that a rotation has, ascending."""
    sizes = (LEAST_BLOCK << i for i in range(5))
    return tuple(size for size in sizes if rotation != "convrot" or size.bit_length() % 2 == 1)


def block_of(K: int, block: int, rotation: str) -> int:
    """The size of the blocks of K columns: the largest up to ``block`` that divides K, else ``block``.

    In the second case K is padded with zeros (``rotated_columns``).
    """
    sizes = [size for size in allowed_blocks(rotation) if size <= block]
    return max((size for size in sizes if K % size == 0), default=block)


def rotated_columns(K: int, block: int, rotation: str) -> int:
    """How many columns K become: more where no block divides it."""
    if rotation == NONE:
        return K
    size = block_of(K, block, rotation)
    return -(-K // size) * size


def is_negative(j: int, rotation: str) -> bool:
    """Whether ``sign[j]`` is -1."""
    if rotation == "random-signs":
        return bool(RANDOM_BITS[j // 64] >> j % 64 & 1)
    return (j & j >> 1 & 0x55).bit_count() % 2 == 1


@functools.cache
def _signs(size: int, rotation: str) -> tuple[float, ...]:
    return tuple(-1.0 if is_negative(j, rotation) else 1.0 for j in range(size))


def _halves(size: int) -> tuple[float, float]:
    """The factors of x and of the weight: 1 / size together, powers of two."""
    exponent = size.bit_length() - 1
    return 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)


def rotate(x: Tensor, block: int, rotation: str) -> Tensor:
    """The formula above.

    Args:
        x: ``[*, K]`` of any floating dtype.
        block: of at most so many columns, see ``block_of``.
        rotation: a name of ``ROTATIONS``.

    Returns:
        ``[*, rotated_columns(K)]`` fp32. Of a row with an element above a sixteenth of the largest
        float, elements may be infinite.
    """
    size = block_of(x.shape[-1], block, rotation)
    return _rotated(x.to(torch.float32), size, rotation, _halves(size)[0])


def rotate_weight(weight: Tensor, block: int, rotation: str) -> Tensor:
    """The same for the other side of the product: ``rotate(x) @ rotate_weight(w)ᵀ = x @ wᵀ``."""
    size = block_of(weight.shape[-1], block, rotation)
    return _rotated(weight.to(torch.float32), size, rotation, _halves(size)[1])


def rotate_back(rotated: Tensor, K: int, block: int, rotation: str) -> Tensor:
    """``w [*, K]`` of ``rotate_weight(w) [*, rotated_columns(K)]``, in fp32 or fp64."""
    size = block_of(K, block, rotation)
    return _rotated_back(rotated, K, size, rotation, _halves(size)[0])


def rotate_back_input(rotated: Tensor, K: int, block: int, rotation: str) -> Tensor:
    """``x [*, K]`` of ``rotate(x)``, in fp32 or fp64."""
    size = block_of(K, block, rotation)
    return _rotated_back(rotated, K, size, rotation, _halves(size)[1])


def _rotated_back(rotated: Tensor, K: int, size: int, rotation: str, factor: float) -> Tensor:
    # S is symmetric: the butterflies are those of ``rotate``, and the signs come last.
    blocks = _butterflies(rotated.unflatten(-1, (-1, size)) * factor, size)
    return (blocks * _signs_of(blocks, size, rotation)).flatten(-2)[..., :K]


def _rotated(x: Tensor, size: int, rotation: str, factor: float) -> Tensor:
    blocks = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return _butterflies(blocks * (_signs_of(blocks, size, rotation) * factor), size).flatten(-2)


def _signs_of(like: Tensor, size: int, rotation: str) -> Tensor:
    return torch.tensor(_signs(size, rotation), dtype=like.dtype, device=like.device)


def _butterflies(blocks: Tensor, size: int) -> Tensor:
    stride = 1
    while stride < size:
        low, high = blocks.unflatten(-1, (-1, 2, stride)).unbind(-2)
        blocks = torch.stack((low + high, low - high), -2).flatten(-3)
        stride *= 2
    return blocks


# --- the order of files ---------------------------------------------------------------------------


def to_regular(rotated: Tensor, K: int, block: int, rotation: str) -> Tensor:
    """A weight's rotated columns in the order and with the signs of the regular matrix.

    ConvRot's files hold ``w_int8`` so. Negating an int8 value is exact, as none is -128.
    """
    order, signs = _regular(block_of(K, block, rotation), rotation)
    blocks = rotated.unflatten(-1, (-1, len(order)))[..., list(order)]
    return (blocks * torch.tensor(signs, dtype=rotated.dtype, device=rotated.device)).flatten(-2)


def from_regular(regular: Tensor, K: int, block: int, rotation: str) -> Tensor:
    """The inverse of ``to_regular``."""
    order, signs = _regular(block_of(K, block, rotation), rotation)
    signed = regular.unflatten(-1, (-1, len(order)))
    signed = signed * torch.tensor(signs, dtype=regular.dtype, device=regular.device)
    blocks = torch.empty_like(signed)
    blocks[..., list(order)] = signed
    return blocks.flatten(-2)


@functools.cache
def _regular(size: int, rotation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row i of the regular matrix is ``signs[i]`` times row ``order[i]`` of S D.

    In the factor of 4, row 1 of one is row 2 of the other, and row 3 is negated. So in base 4 the
    digits 1 and 2 change places, and each 3 negates.
    """
    if rotation == "random-signs":
        return tuple(range(size)), (1,) * size
    bits = size.bit_length() - 1
    order = []
    for i in range(size):
        swapped = (i & 0x55) << 1 | i >> 1 & 0x55
        # Of an odd number of bits the first has no partner: a factor of 2, which is Sylvester's.
        top = i & size >> 1 if bits % 2 else 0
        order.append((swapped & (size >> bits % 2) - 1) | top)
    return tuple(order), tuple(-1 if is_negative(i, rotation) else 1 for i in range(size))
