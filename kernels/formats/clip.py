"""Round-to-nearest by groups, with the clip that loses least.

A group's range is made smaller in steps, and the step with the least squared error is kept: what lies
outside is clipped, and what lies inside is on a finer grid. (OmniQuant, arXiv 2308.13137, learns this
clip; AWQ, arXiv 2306.00978, searches it.)
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINKS = tuple(1 - step / 20 for step in range(11))  # of the range
_ELEMENTS_AT_ONCE = 2**20


def quantize_groups(
    weight: Tensor, bits: int, group: int, zeros: str, dtype: torch.dtype
) -> list[Tensor]:
    """``codes [N, G · group]`` uint8, ``scale [N, G]``, and zero points or offsets ``[N, G]``.

    Args:
        weight: ``[N, K]`` of any floating dtype.
        bits, group, zeros: as in ``grouped.py``.
        dtype: of scales, of offsets, and of zero points in float.
    """
    pieces = [_quantize_rows(weight[rows], bits, group, zeros, dtype) for rows in some_rows(weight)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _quantize_rows(
    weight: Tensor, bits: int, group: int, zeros: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    width = weight.shape[1] if group < 0 else group
    groups = F.pad(weight.float(), (0, -weight.shape[1] % width)).unflatten(1, (-1, width))
    grid = grid_of_groups(groups, bits, zeros, dtype)
    codes = codes_on(groups, grid, bits).to(torch.uint8).flatten(1)
    return (codes, *stored_grid(*grid, bits, zeros, dtype))


def grid_of_groups(groups: Tensor, bits: int, zeros: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``scale`` and ``zero [N, G, 1]`` fp32 of ``groups [N, G, group]``, with the best clip."""
    low, high = _ranges(groups, bits, zeros)
    best, least = grid_of(low, high, bits, zeros, dtype), None
    for shrink in SHRINKS:
        grid = grid_of(low * shrink, high * shrink, bits, zeros, dtype)
        error = (values_on(codes_on(groups, grid, bits), grid) - groups).square_().sum(-1, keepdim=True)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        least = error if least is None else torch.where(better, error, least)
        scale, zero = (torch.where(better, new, old) for new, old in zip(grid, best, strict=True))
        best = scale, zero
    return best


def _ranges(groups: Tensor, bits: int, zeros: str) -> tuple[Tensor, Tensor]:
    """The values of the first and the last code, ``[N, G, 1]``; 0 is among them."""
    if zeros == "middle":
        # One side of the range has a code more, which may serve the largest.
        step = groups.abs().amax(-1, keepdim=True) / max(1, 2 ** (bits - 1) - 1)
        return step * -(2 ** (bits - 1)), step * (2 ** (bits - 1) - 1)
    return groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)


def grid_of(
    low: Tensor, high: Tensor, bits: int, zeros: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``scale`` and ``zero`` in fp32, as ``dtype`` holds them: code c stands for (c - zero) · scale."""
    most, info = 2**bits - 1, torch.finfo(dtype)
    largest = info.max / 2 ** (bits - 1)
    scale = (high / most - low / most).clamp(_least(dtype), largest).to(dtype).float()
    zero = _zero_of(low, scale, bits, zeros, dtype)
    # A scale that was rounded up may stand for more than the largest float.
    over = torch.maximum(zero, most - zero) * scale > info.max
    return torch.where(over, (scale * (1 - info.eps)).to(dtype).float(), scale), zero


def _zero_of(low: Tensor, scale: Tensor, bits: int, zeros: str, dtype: torch.dtype) -> Tensor:
    if zeros == "middle":
        return torch.full_like(scale, 2 ** (bits - 1))
    if zeros == "offset":
        return -low.to(dtype).float() / scale
    zero = (-low / scale).clamp(0, 2**bits - 1)
    return zero.round() if zeros == "integer" else zero.to(dtype).float()


def codes_on(groups: Tensor, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    """The nearest codes, as floats."""
    scale, zero = grid
    return (groups / scale + zero).round_().clamp_(0, 2**bits - 1)


def values_on(codes: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
    scale, zero = grid
    return (codes - zero) * scale


def stored_grid(scale: Tensor, zero: Tensor, bits: int, zeros: str, dtype: torch.dtype) -> list[Tensor]:
    """``scale [N, G]`` in ``dtype``, and what ``zeros`` stores beside it."""
    scale, zero = scale.squeeze(-1), zero.squeeze(-1)
    if zeros == "middle":
        return [scale.to(dtype)]
    if zeros == "integer":
        return [scale.to(dtype), zero.to(torch.uint8)]
    return [scale.to(dtype), (zero if zeros == "float" else -zero * scale).to(dtype)]


def _least(dtype: torch.dtype) -> float:
    """The smallest scale: of fp16 a subnormal one, as a normal one is coarse beside small weights."""
    return 2.0**-24 if dtype == torch.float16 else 2.0**-126


def some_rows(weight: Tensor) -> Iterator[slice]:
    """Some rows at a time: several forms of a large weight in fp32 are what a peak is made of."""
    step = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    return (slice(start, start + step) for start in range(0, max(1, len(weight)), step))
