"""From the neutral form of a weight to a ``QuantizedWeight``: which scheme keeps it, exactly.

| neutral form | scheme |
|---|---|
| signed 8 bits, one scale a row | its owner's ``absmax-vector`` or ``llm.int8``; else ``w8a16`` |
| the same, a scale for each group | ``w8a16-group`` |
| 4 bits by groups | ``w4a16-group`` |
| other bits by groups, or zero points of 8 bits | ``wna16-group`` |
| groups along N | ``wna16-rows`` |
| NF4, FP4 | ``nf4`` |
| rotated int8 | ``int8-rotated`` |
| values | that which is asked for, ``llm.int8`` by default: these are quantised again |
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8fx.errors import CheckpointError
from int8fx.kernels import packing
from int8fx.kernels.formats import codebook, grouped, row_groups
from int8fx.kernels.ops.rotation import from_regular
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import DEFAULT, scheme_named
from int8fx.weights.readers.neutral import Coded, Grouped, Neutral, Rotated, Values
from int8fx.weights.readers.unpacking import row_blocks
from int8fx.weights.tensor import QuantizedWeight

_LEAST_GROUP = 16


@dataclass(frozen=True)
class InScheme:
    """A weight in a scheme, and the parts of its format."""

    choice: Choice
    parts: Sequence[Tensor]


def quantized(
    neutral: Neutral, dtype: torch.dtype, name: str, transposed: bool = False, scheme: str | None = None
) -> QuantizedWeight:
    """The weight, standing for a float tensor of ``dtype``.

    Args:
        name: of the weight, for messages.
        transposed: whether its module keeps it as ``[K, N]``.
        scheme: in the place of the one above, for the same stored numbers.

    Raises:
        CheckpointError: nothing keeps it exactly, or the scheme asked for keeps it otherwise.
    """
    N, K = neutral.shape
    if isinstance(neutral, Values):
        weight = neutral.weight.to(dtype)
        choice = scheme_named(scheme or DEFAULT).choice()
        return QuantizedWeight.quantized(weight.t() if transposed else weight, choice, transposed)
    read = _in_scheme(neutral, name)
    choice = _asked_for(read.choice, scheme, name) if scheme else read.choice
    packed = packing.pack(choice.weight_format, read.parts, N, K)
    # What is mapped from a file must not be what a weight consists of.
    owned = [part.clone() if any(part is each for each in read.parts) else part for part in packed]
    return QuantizedWeight(*owned, choice=choice, N=N, K=K, dtype=dtype, transposed=transposed)


def scheme_of(neutral: Neutral, name: str) -> str:
    """The name of the scheme that keeps a weight.

    Raises:
        CheckpointError: nothing keeps it exactly.
    """
    return DEFAULT if isinstance(neutral, Values) else _in_scheme(neutral, name).choice.scheme.name


def _asked_for(choice: Choice, scheme: str, name: str) -> Choice:
    """Another scheme with the settings that it has in common.

    Raises:
        CheckpointError: it keeps weights otherwise.
    """
    other = scheme_named(scheme)
    settings = {key: value for key, value in choice.options.items() if key in other.reads}
    settings |= {"rotation": "none"} if "rotation" in other.reads and "rotation" not in settings else {}
    asked = other.choice(**settings)
    if asked.weight_format.files != choice.weight_format.files:
        raise CheckpointError(
            f"{name}: {choice.weight_format.files} in the checkpoint, and scheme {scheme!r} keeps "
            f"{asked.weight_format.files}"
        )
    return asked


def _in_scheme(neutral: Grouped | Coded | Rotated, name: str) -> InScheme:
    if isinstance(neutral, Coded):
        return _coded(neutral, name)
    if isinstance(neutral, Rotated):
        return _rotated(neutral)
    if neutral.transposed:
        return _by_rows(neutral, name)
    signed = neutral.codes.dtype == torch.int8
    if signed and neutral.bits == 8 and neutral.is_symmetric and neutral.g_idx is None:
        return _int8(neutral, name)
    return _grouped(neutral, name)


def _choice(scheme: str, **settings: Any) -> Choice:
    return scheme_named(scheme).choice(**settings)


def _int8(neutral: Grouped, name: str) -> InScheme:
    K, scale = neutral.shape[1], neutral.scale.float()
    if scale.shape[1] == 1:
        owner: Mapping[str, Any] = neutral.owner or {"scheme": "w8a16"}
        return InScheme(_choice(**owner), _per_channel(neutral.codes, scale.squeeze(1), name))
    _check_group(neutral.group, name)
    padded = torch.nn.functional.pad(neutral.codes, (0, -K % neutral.group))
    return InScheme(_choice("w8a16-group", group_size=neutral.group), (padded, scale.contiguous()))


def _per_channel(codes: Tensor, scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Rows of zeros may have a scale of 0 in a file, and have one above it here."""
    if bool((scale < 0).any()):
        raise CheckpointError(f"{name}: a scale below 0, which int8 per channel has not")
    of_zeros = scale == 0
    if not bool(of_zeros.any()):
        return codes, scale.contiguous()
    return codes.masked_fill(of_zeros.unsqueeze(1), 0), scale.masked_fill(of_zeros, 1)


def _grouped(neutral: Grouped, name: str) -> InScheme:
    neutral = _unsigned(_with_one_zero(neutral))
    K, bits = neutral.shape[1], neutral.bits
    zeros, zero_point = _zeros(neutral)
    g_idx = neutral.g_idx
    group = grouped.WHOLE if neutral.group >= K and g_idx is None else neutral.group
    if group != grouped.WHOLE:
        _check_group(group, name)
    if g_idx is not None and not grouped.needs_order(g_idx, group):
        g_idx = None
    settings: dict[str, Any] = {"group_size": group, "zeros": zeros, "act_order": g_idx is not None}
    scheme = "w4a16-group" if bits == 4 else "wna16-group"
    choice = _choice(scheme, **settings, **({} if bits == 4 else {"bits": bits}))
    try:
        parts = _in_blocks(neutral, zero_point, g_idx, group, zeros)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return InScheme(choice, parts)


def _in_blocks(
    neutral: Grouped, zero_point: Tensor | None, g_idx: Tensor | None, group: int, zeros: str
) -> list[Tensor]:
    """``grouped.from_codes``, some rows at a time."""
    pieces = [
        grouped.from_codes(
            neutral.codes[rows],
            neutral.scale[rows],
            None if zero_point is None else zero_point[rows],
            g_idx,
            neutral.bits,
            group,
            zeros=zeros,
        )
        for rows in row_blocks(*neutral.shape)
    ]
    by_row = len(pieces[0]) - (g_idx is not None)  # the order of columns is one for all rows
    parts = [torch.cat(each) for each in zip(*(piece[:by_row] for piece in pieces), strict=True)]
    return [*parts, *pieces[0][by_row:]]


def _check_group(group: int, name: str) -> None:
    if group % _LEAST_GROUP:
        raise CheckpointError(f"{name}: groups of {group} columns; kept: multiples of {_LEAST_GROUP}")


def _with_one_zero(neutral: Grouped) -> Grouped:
    """Of a zero point and an offset, an offset alone: torchao's (q - 8) · scale + zero."""
    if neutral.zero_point is None or neutral.offset is None:
        return neutral
    offset = neutral.offset.float() - neutral.zero_point.float() * neutral.scale.float()
    return _replaced(neutral, zero_point=None, offset=offset)


def _unsigned(neutral: Grouped) -> Grouped:
    """Codes from 0 to 2**bits - 1, of signed ones: the zero point is moved as well."""
    if neutral.codes.dtype == torch.uint8:
        return neutral
    middle = 2 ** (neutral.bits - 1)
    codes = (neutral.codes.to(torch.int16) + middle).to(torch.uint8)
    if neutral.offset is not None:
        offset = neutral.offset.float() - middle * neutral.scale.float()
        return _replaced(neutral, codes=codes, offset=offset)
    zero_point = neutral.zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(neutral.scale, dtype=torch.int16)
    if not zero_point.is_floating_point():
        zero_point = zero_point.to(torch.int16)
    return _replaced(neutral, codes=codes, zero_point=zero_point + middle)


def _replaced(neutral: Grouped, **changed: Any) -> Grouped:
    names = ("codes", "scale", "group", "bits", "zero_point", "offset", "g_idx", "transposed", "owner")
    return Grouped(**({name: getattr(neutral, name) for name in names} | changed))


def _zeros(neutral: Grouped) -> tuple[str, Tensor | None]:
    """What stands for 0, by a name of ``grouped.ZEROS``."""
    if neutral.offset is not None:
        return "offset", neutral.offset
    zero_point = neutral.zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(neutral.scale, dtype=torch.uint8)
    if bool((zero_point == 2 ** (neutral.bits - 1)).all()):
        return "middle", None
    return ("float" if zero_point.is_floating_point() else "integer"), zero_point


def _by_rows(neutral: Grouped, name: str) -> InScheme:
    neutral = _unsigned(_with_one_zero(neutral))
    zeros, zero_point = _zeros(neutral)
    N = neutral.shape[0]
    choice = _choice("wna16-rows", bits=neutral.bits, group_size=neutral.group, zeros=zeros)
    strided = torch.arange(N, device=neutral.codes.device) % neutral.scale.shape[1]
    if neutral.g_idx is None or not torch.equal(neutral.g_idx.long(), strided):
        raise CheckpointError(f"{name}: groups of rows that are not N / group apart are not kept")
    parts = row_groups.from_codes(
        neutral.codes.t(),
        neutral.scale.t(),
        None if zero_point is None else zero_point.t(),
        neutral.bits,
    )
    return InScheme(choice, parts)


def _coded(neutral: Coded, name: str) -> InScheme:
    K = neutral.shape[1]
    kind = next((k for k, values in codebook.CODEBOOKS.items() if _is(neutral.codebook, values)), None)
    if kind is None:
        raise CheckpointError(f"{name}: a codebook of its own; kept: those of NF4 and FP4")
    pieces = [
        codebook.from_bitsandbytes(packed, absmax, rows, K, neutral.block)
        for packed, absmax, rows in _pieces(neutral)
    ]
    parts = [torch.cat(each) for each in zip(*(parts for _, parts in pieces), strict=True)]
    return InScheme(_choice("nf4", quant_type=kind, blocksize=pieces[0][0], double_quant=False), parts)


def _pieces(neutral: Coded) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Bytes, scales and the number of rows, some rows at a time, where blocks end with rows."""
    N, K = neutral.shape
    block = neutral.block
    if K % block or block % 2:
        yield neutral.packed, neutral.absmax, N
        return
    for rows in row_blocks(N, K):
        stop = min(rows.stop, N)
        yield (
            neutral.packed[rows.start * K // 2 : stop * K // 2],
            neutral.absmax[rows.start * K // block : stop * K // block],
            stop - rows.start,
        )


def _is(found: Tensor, values: Sequence[float]) -> bool:
    expected = torch.tensor(values, dtype=torch.float32, device=found.device)
    return torch.equal(found.float(), expected)


def _rotated(neutral: Rotated) -> InScheme:
    N, K = neutral.shape
    choice = _choice("int8-rotated", block=neutral.block, rotation="convrot")
    codes = from_regular(neutral.codes, K, neutral.block, "convrot")
    columns = torch.empty(N, 0, dtype=torch.float32, device=codes.device)
    return InScheme(choice, (codes, neutral.scale.contiguous(), columns))
