"""Integers of a few bits by groups along K: each group has a scale, and may have a zero point.

    ŵ[n, k] = (code[n, k] - zero[n, g]) · scale[n, g]   in fp32,    g = k // group

| zeros | zero[n, g] is |
|---|---|
| ``"middle"`` | ``2**(bits - 1)``, and not stored: symmetric |
| ``"integer"`` | ``zero_point`` uint8 |
| ``"float"`` | ``zero_point``, a float |
| ``"offset"`` | ``-offset / scale``: ŵ = code · scale + ``offset``, a float |

With ``column_scale`` a column of ŵ is that times ``column_scale[k]``, by which a product multiplies x.

With ``act_order`` the columns of one group need not lie beside each other in the weight. They do in
what is stored: its column j is the weight's column ``order[j]``.

GPTQ, AWQ, HQQ, quanto, compressed-tensors and GGUF write such weights. ``from_codes`` makes the stored
parts of what their files hold.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.clip import quantize_groups
from int8fx.kernels.formats.codes import codes_in_a_byte, pack_bits, unpack_bits
from int8fx.kernels.formats.format import CHANNEL, ROWS, Axis, Part, WeightFormat

ZEROS = ("middle", "integer", "float", "offset")
WHOLE = -1  # as a group: all of K
# The part beside the scales: its name, and its dtype, of which None is a float of 16 or 32 bits.
_ZERO_PARTS: dict[str, tuple[tuple[str, torch.dtype | None], ...]] = {
    "middle": (),
    "integer": (("zero_point", torch.uint8),),
    "float": (("zero_point", None),),
    "offset": (("offset", None),),
}


@functools.cache
def grouped(
    bits: int,
    group: int,
    zeros: str = "middle",
    act_order: bool = False,
    column_scale: bool = False,
) -> WeightFormat:
    """``packed [N, bytes]`` uint8, ``scale [N, G]``, then zero points or offsets ``[N, G]``, then
    ``order [K]`` int32, then ``column_scale [K]``.

    K is padded to a multiple of the group, with codes that mean nothing. Scales, offsets and zero
    points in float are fp32, bf16 or fp16. ``quantize`` gives them the dtype of its weight.

    Args:
        bits: 1 to 8; ``kernels/formats/codes.py`` says how many codes a byte holds.
        group: how many weights along K share a scale, or ``WHOLE``.
    """

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach()
        codes, *others = quantize_groups(weight, bits, group, zeros, weight.dtype)
        if act_order:
            others.append(torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device))
        if column_scale:
            others.append(torch.ones_like(weight[0]))
        return (pack_bits(codes, bits), *others)

    def dequantize(stored: Sequence[Tensor], N: int, K: int) -> Tensor:
        packed, *others = stored
        scaled = others.pop() if column_scale else None
        order = others.pop() if act_order else None
        w_hat = dequantize_codes(unpack_bits(packed, bits), bits, group, zeros, others, K)
        if order is not None:
            w_hat = torch.zeros_like(w_hat).index_copy(1, order.long(), w_hat)
        return w_hat if scaled is None else w_hat * scaled.to(w_hat.dtype)

    by_group = Axis("K", group) if group != WHOLE else 1
    of_order = (Part("order", torch.int32, (Axis("K"),), of_all_columns=True),) if act_order else ()
    of_columns = (Part("column_scale", None, (Axis("K"),)),) if column_scale else ()
    name = name_of(bits, group, zeros) + (", act-order" if act_order else "")
    return WeightFormat(
        name + (", scaled columns" if column_scale else ""),
        (
            Part("packed", torch.uint8, (ROWS, codes_along(bits, group))),
            Part("scale", None, (ROWS, by_group)),
            *parts_of_zeros(zeros, by_group),
            *of_order,
            *of_columns,
        ),
        quantize,
        dequantize,
        bits=bits,
        granularity=group if group != WHOLE else CHANNEL,
        zero_point=zeros in ("integer", "float"),
        family=f"{bits}-bit by groups",
    )


def codes_along(bits: int, group: int) -> Axis:
    """The columns of ``packed``: bytes along K."""
    return Axis("K", codes_in_a_byte(bits), multiple=1 if group == WHOLE else group)


def parts_of_zeros(zeros: str, by_group: Axis | int) -> tuple[Part, ...]:
    """What is stored beside the scales."""
    return tuple(Part(name, dtype, (ROWS, by_group)) for name, dtype in _ZERO_PARTS[zeros])


def name_of(bits: int, group: int, zeros: str) -> str:
    shared = "per channel" if group == WHOLE else f"by groups of {group}"
    return (
        f"{bits}-bit {shared}"
        + {
            "middle": "",
            "integer": ", with zero points",
            "float": ", with zero points in float",
            "offset": ", with offsets",
        }[zeros]
    )


def dequantize_codes(
    codes: Tensor, bits: int, group: int, zeros: str, others: Sequence[Tensor], K: int
) -> Tensor:
    """ŵ ``[N, K]`` fp32 of codes ``[N, G · group]``; fp64 of scales in fp64.

    Args:
        others: scales ``[N, G]``, and the zero points or offsets where ``zeros`` has some.
    """
    dtype = torch.float64 if others[0].dtype == torch.float64 else torch.float32
    scale, *rest = (part.to(dtype).unsqueeze(-1) for part in others)
    steps = codes.unflatten(1, (1, -1) if group == WHOLE else (-1, group)).to(dtype)
    if zeros == "offset":
        w_hat = steps * scale + rest[0]
    else:
        w_hat = (steps - (rest[0] if rest else 2 ** (bits - 1))) * scale
    # No copy: Inductor of torch 2.13 generates wrong code for one of such a slice.
    return w_hat.flatten(1)[:, :K]


# --- what files hold ------------------------------------------------------------------------------


def from_codes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    group: int,
    zeros: str | None = None,
) -> tuple[Tensor, ...]:
    """The stored parts of ``grouped(bits, group, zeros, act_order=g_idx is not None)``.

    Args:
        codes: ``[N, K]``, integers from 0 to ``2**bits - 1``, columns in the weight's order.
        scale: ``[N, G]``, fp32, bf16 or fp16; of column k it is that of group ``g_idx[k]``, or
            ``k // group``.
        zero_point: ``[N, G]``: which code stands for 0, in integers or in float; with
            ``zeros="offset"`` the offset. None: ``2**(bits - 1)``.
        g_idx: ``[K]``: the group of each column. ``needs_order`` says whether a file's is worth it.
        zeros: a name of ``ZEROS``; by default that which ``zero_point``'s dtype says.

    Raises:
        ValueError: names what was given and what is allowed.
    """
    N, K = codes.shape
    width = K if group == WHOLE else group
    G = -(-K // width)
    zeros = zeros or zeros_of(zero_point)
    _check(zeros in ZEROS, f"zeros is {zeros!r}", ", ".join(ZEROS))
    _check((zero_point is None) == (zeros == "middle"), f"zeros is {zeros!r}", "as zero_point is given")
    _check_range("codes", codes, 2**bits - 1)
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        if part is not None:
            _check(tuple(part.shape) == (N, G), f"{name} has shape {list(part.shape)}", f"{[N, G]}")
    floats = (torch.float32, torch.bfloat16, torch.float16)
    _check(scale.dtype in floats, f"scale is {scale.dtype}", "float32, bfloat16 or float16")
    others = [scale.contiguous()]
    if zero_point is not None:
        if zeros == "integer":
            _check_range("zero_point", zero_point, 255)
            zero_point = zero_point.to(torch.uint8)
        else:
            _check(zero_point.dtype in floats, f"{zeros} is {zero_point.dtype}", "a float")
        others.append(zero_point.contiguous())
    if g_idx is not None:
        order = order_of(g_idx, K, width)
        codes = codes.index_select(1, order.long())
        others.append(order)
    padded = F.pad(codes.to(torch.uint8), (0, G * width - K))
    return (pack_bits(padded, bits), *others)


def zeros_of(zero_point: Tensor | None) -> str:
    """What ``from_codes`` takes zero points for by default."""
    if zero_point is None:
        return "middle"
    return "float" if zero_point.is_floating_point() else "integer"


def needs_order(g_idx: Tensor, group: int) -> bool:
    """Whether some column is not in the group of its neighbours: else ``g_idx`` says nothing."""
    width = len(g_idx) if group == WHOLE else group
    return not torch.equal(g_idx.long(), torch.arange(len(g_idx), device=g_idx.device) // width)


def order_of(g_idx: Tensor, K: int, width: int) -> Tensor:
    """Which columns lie in group 0, then in group 1, ...: ``[K]`` int32.

    Raises:
        ValueError: a group has more columns than the others, or fewer and is not the last.
    """
    _check(tuple(g_idx.shape) == (K,), f"g_idx has shape {list(g_idx.shape)}", f"{[K]}")
    order = torch.argsort(g_idx, stable=True)
    expected = torch.arange(K, device=g_idx.device) // width
    _check(
        torch.equal(g_idx[order].long(), expected),
        f"g_idx has groups of {torch.bincount(g_idx.long().clamp_min(0)).tolist()[:8]} columns",
        f"{width} in each group but the last, numbered from 0",
    )
    return order.to(torch.int32)


def _check_range(name: str, integers: Tensor, most: int) -> None:
    _check(not integers.is_floating_point(), f"{name} is {integers.dtype}", "integers")
    if integers.numel():
        least, largest = int(integers.min()), int(integers.max())
        _check(least >= 0 and largest <= most, f"{name} has {least} to {largest}", f"0 to {most}")


def _check(fits: bool, given: str, allowed: str) -> None:
    if not fits:
        raise ValueError(f"from_codes: {given}; allowed: {allowed}")
