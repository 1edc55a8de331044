"""NF4 and FP4 as bitsandbytes has them: four bits name one of 16 values, scaled block by block.

    ŵ[n, k] = CODEBOOK[code[n, k]] · absmax[n, b]   in fp32,    b = k // block

With ``nested`` absmax is in 8 bits itself, by blocks of 256 along a row (double quantisation):

    absmax[n, b] = DYNAMIC_MAP[absmax_code[n, b]] · nested_absmax[n, b // 256] + offset[n]

bitsandbytes counts its blocks over the rows as they follow each other in memory. Where the block
divides K, these are the same. ``from_bitsandbytes`` makes the parts of any other weight, too.

Source: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.codes import pack_bits
from int8fx.kernels.formats.format import ROWS, Axis, Part, WeightFormat
from int8fx.kernels.ops.codebook_linear import decoded

# Quantiles of the normal distribution, appendix E of the paper.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign, two bits of exponent and one of mantissa, as multiples of 1/12.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in _FP4_TWELFTHS),
}
NESTED_BLOCK = 256  # absmax values that share one of their own
_LEAST = 2.0**-126  # an absmax of fp32


@functools.cache
def codebook(name: str, block: int = 64, nested: bool = False) -> WeightFormat:
    """``packed [N, K / 2]`` uint8, the even column in its low half; K is padded to full blocks.

    Then ``absmax [N, G]`` fp32; or nested ``absmax [N, G]`` uint8, ``nested_absmax [N, ceil(G / 256)]``
    and ``offset [N]``, fp32.

    Args:
        name: of ``CODEBOOKS``.
        block: how many weights along K share an absmax.
    """

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach().float()
        blocks = F.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
        absmax = blocks.abs().amax(-1)
        others = nest(absmax) if nested else (absmax,)
        # On the grid that the nested absmax gives, a code is the nearest to the weight. That absmax may
        # be below 0, of a block much smaller than the others, and then turns the codes' signs.
        steps = absmax_of(others)
        steps = steps.where(steps.abs() >= _LEAST, _LEAST).unsqueeze(-1)
        codes = nearest(blocks / steps, _values(name, weight.device))
        return (_packed(codes.flatten(1), block), *others)

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        packed, *others = stored
        return decoded(packed, absmax_of(others), _values(name, packed.device), block, K)

    by_block = (ROWS, Axis("K", block))
    absmax_parts = (
        (
            Part("absmax", torch.uint8, by_block),
            Part("nested_absmax", torch.float32, (ROWS, Axis("K", block * NESTED_BLOCK))),
            Part("offset", torch.float32, (ROWS,)),
        )
        if nested
        else (Part("absmax", torch.float32, by_block),)
    )
    return WeightFormat(
        f"{name.upper()} by blocks of {block}" + (", double quantised" if nested else ""),
        (Part("packed", torch.uint8, (ROWS, Axis("K", 2, multiple=block))), *absmax_parts),
        quantize,
        dequantize,
        bits=4,
        granularity=block,
        codebook=CODEBOOKS[name],
        family=family_of(name),
    )


def family_of(name: str) -> str:
    """What the formats of a codebook are called in the kernel table."""
    return f"{name} by blocks"


def _packed(codes: Tensor, block: int) -> Tensor:
    # An odd block ends in the middle of a byte.
    return pack_bits(F.pad(codes, (0, -codes.shape[1] % math.lcm(2, block))), 4)


def _values(name: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


def values_of(name: str, like: Tensor) -> Tensor:
    """The codebook on the device of a tensor."""
    return _values(name, like.device)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """uint8 of x's shape: the index of the nearest of some values, which need not ascend."""
    ascending, order = values.sort()
    middles = (ascending[1:] + ascending[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(x, middles)]


# --- absmax ---------------------------------------------------------------------------------------


@functools.cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, ascending (arXiv 1511.04561).

    Value i of 2**e with exponent e - 6 is the middle of one of 2**e equal parts of [0.1, 1], times
    10**(e - 6), of either sign; then 0 and 1.
    """
    positive: list[float] = []
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        positive += (10 ** (exponent - 6) * means).tolist()
    values = torch.tensor([*positive, *(-value for value in positive), 0.0, 1.0], dtype=torch.float32)
    return tuple(values.sort().values.tolist())


_DYNAMIC_MAP = dynamic_map()  # Dynamo, which traces what is cached, does not trace how it is made


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``absmax [N, G]`` in 8 bits, with ``nested_absmax`` and ``offset`` as above."""
    N, G = absmax.shape
    # In fp64, as a sum of the largest floats is none.
    mean = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    offset = mean.expand(N).contiguous()
    centred = F.pad(absmax - offset.unsqueeze(1), (0, -G % NESTED_BLOCK))
    centred = centred.unflatten(1, (-1, NESTED_BLOCK))
    largest = centred.abs().amax(-1)
    steps = centred / largest.clamp_min(_LEAST).unsqueeze(-1)
    codes = nearest(steps, _dynamic_values(absmax.device)).flatten(1)[:, :G].contiguous()
    return codes, largest, offset


def absmax_of(others: Sequence[Tensor]) -> Tensor:
    """``absmax [N, G]`` of the parts behind the codes."""
    if len(others) == 1:
        return others[0]
    codes, largest, offset = others
    G = codes.shape[1]
    values = _dynamic_values(codes.device).to(largest.dtype)[codes.long()]
    absmax = values * largest.repeat_interleave(NESTED_BLOCK, 1)[:, :G] + offset.unsqueeze(1)
    return absmax.clamp_max(torch.finfo(absmax.dtype).max)


def _dynamic_values(device: torch.device) -> Tensor:
    return torch.tensor(_DYNAMIC_MAP, dtype=torch.float32, device=device)


# --- what files hold ------------------------------------------------------------------------------


def from_bitsandbytes(
    packed: Tensor, absmax: Tensor, N: int, K: int, blocksize: int
) -> tuple[int, tuple[Tensor, Tensor]]:
    """The parts of ``codebook(name, block)`` of a weight of bitsandbytes, and that block.

    Args:
        packed: ``[N · K / 2]`` uint8 in any shape: the rows behind each other, the first of two
            elements in the high half.
        absmax: ``[ceil(N · K / blocksize)]`` fp32; a nested one un-nested before.

    Returns:
        ``block``, which is ``blocksize`` where that divides K, and else divides both; and the parts.

    Raises:
        ValueError: a tensor has another number of elements than the shape says.
    """
    packed, absmax = packed.flatten().view(torch.uint8), absmax.flatten()
    if packed.numel() != -(-N * K // 2) or absmax.numel() != -(-N * K // blocksize):
        raise ValueError(
            f"a weight [{N}, {K}] in blocks of {blocksize} has {-(-N * K // 2)} bytes and "
            f"{-(-N * K // blocksize)} absmax; given: {packed.numel()} and {absmax.numel()}"
        )
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: N * K].reshape(N, K)
    block = math.gcd(K, blocksize)
    each = absmax.repeat_interleave(blocksize // block)[: N * K // block]
    return block, (_packed(codes, block), each.reshape(N, K // block).float())
