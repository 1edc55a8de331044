"""HQQ's files, as its ``HQQLinear`` writes them for safetensors.

    W_q          the integers, packed by parts of the rows of W.reshape(-1, g) (axis 1) or (g, -1)
                 (axis 0): 8, 6, 5 bits a byte each; 4 bits the first half of the rows in the high
                 nibble; 2 bits quarters, 1 bit eighths; 3 bits ten parts in an int32, the first in
                 the bits from 27 on
    scale, zero  one for each group; ŵ = (q - zero) · scale with a float zero
    nbits, group_size, axis, shape, packing, view_as_float, compute_dtype, ...
                 numbers and names, as tensors

Its ``quantize.py`` and ``bitpack.py`` are the source.
"""

import torch
from torch import Tensor

from int8fx.weights.readers.module import FLOATS, StoredModule
from int8fx.weights.readers.neutral import Grouped
from int8fx.weights.readers.settings import Config
from int8fx.weights.readers.unpacking import halves

# How many integers are in an element of W_q.
_PARTS = {"8bit_u8": 1, "4bit_u8": 2, "2bit_u8": 4, "1bit_u8": 8}
_THREE = "3bit_32"
_IN_WORD = 10
_PACKING = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: _THREE,
    2: "2bit_u8",
    1: "1bit_u8",
}
_TERNARY = 1.58  # bits that are kept as 2
# What is stored beside the weight.
NUMBERS = (
    "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "view_as_float",
    "compute_dtype", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict",
    "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def settings(config: Config) -> None:
    """Each module's settings are beside its weight."""


def read(module: StoredModule, settings: None) -> Grouped:
    """Raises:
    CheckpointError: names the tensor, and what is wrong with it.
    """
    for name in ("quant_scale", "quant_zero"):
        if module.has(name) and _number(module, name):
            raise module.error(name, "quantised scales and zero points are not read")
    bits, axis = _bits(module), _one_of(module, "axis", (0, 1))
    N, K = _shape(module)
    group = _number(module, "group_size")
    if group < 1 or N * K % group:
        raise module.error("group_size", f"{group} does not divide the weights of {[N, K]}")
    rows, columns = (N * K // group, group) if axis == 1 else (group, N * K // group)
    codes = _codes(module, bits, rows, columns)
    count = N * K // group
    scale = _of_groups(module, "scale", count)
    zero = _of_groups(module, "zero", count)
    if axis == 1:
        return _along_rows(module, codes.view(N, K), scale, zero, group, bits)
    return _along_columns(module, codes.view(N, K), scale, zero, group, bits)


def _along_rows(
    module: StoredModule, codes: Tensor, scale: Tensor, zero: Tensor, group: int, bits: int
) -> Grouped:
    N, K = codes.shape
    if K % group:
        raise module.error("group_size", f"{group} columns do not divide K={K}")
    return Grouped(codes, scale.view(N, -1), group, bits, zero_point=zero.view(N, -1))


def _along_columns(
    module: StoredModule, codes: Tensor, scale: Tensor, zero: Tensor, group: int, bits: int
) -> Grouped:
    """Column j of (g, N · K / g) has the weights j, j + N · K / g, ...: rows N / g apart, of one k."""
    N, K = codes.shape
    if N % group:
        raise module.error("group_size", f"{group} rows do not divide N={N}")
    groups = N // group
    return Grouped(
        codes.t().contiguous(),
        scale.view(groups, K).t().contiguous(),
        group,
        bits,
        zero_point=zero.view(groups, K).t().contiguous(),
        g_idx=(torch.arange(N, device=codes.device) % groups).to(torch.int32),
        transposed=True,
    )


def _codes(module: StoredModule, bits: int, rows: int, columns: int) -> Tensor:
    """The integers ``[rows, columns]`` uint8."""
    packing = _text(module, "packing") if module.has("packing") else _PACKING[bits]
    if packing != _PACKING[bits]:
        raise module.error("packing", f"{packing!r}; of {bits} bits {_PACKING[bits]!r} is read")
    stored = module.take("W_q", (torch.uint8, torch.int32, *FLOATS), None, None)
    wanted = torch.int32 if packing == _THREE else torch.uint8
    if stored.dtype.is_floating_point:  # view_as_float
        stored = stored.contiguous().view(wanted)
    parts = _IN_WORD if packing == _THREE else _PARTS[packing]
    height = -(-rows // parts) if packing == _THREE else rows // parts
    if (
        stored.dtype != wanted
        or tuple(stored.shape) != (height, columns)
        or (rows % parts and bits != 3)
    ):
        found = f"{stored.dtype} of shape {list(stored.shape)}"
        raise module.error(
            "W_q", f"{found} in the checkpoint, {wanted} of {[height, columns]} expected"
        )
    if packing == _THREE:
        return _three_bits(stored)[:rows]
    return halves(stored, parts)


def _three_bits(stored: Tensor) -> Tensor:
    return torch.cat([stored >> (27 - 3 * i) & 7 for i in range(_IN_WORD)], 0).to(torch.uint8)


def _of_groups(module: StoredModule, name: str, groups: int) -> Tensor:
    tensor = module.take_floats(name)
    if tensor.numel() != groups:
        raise module.error(
            name, f"shape {list(tensor.shape)} in the checkpoint, {groups} groups expected"
        )
    return tensor.flatten()


def _bits(module: StoredModule) -> int:
    value = round(module.take("nbits", (torch.int32, torch.int64, torch.float32)).item(), 2)
    if value == _TERNARY:
        return 2
    if value not in _PACKING:
        raise module.error("nbits", f"{value}; read: {', '.join(map(str, sorted(_PACKING)))}")
    return int(value)


def _shape(module: StoredModule) -> tuple[int, int]:
    shape = module.take("shape", (torch.int32, torch.int64), 2).tolist()
    if min(shape) < 1:
        raise module.error("shape", f"{shape} is that of no matrix")
    return shape[0], shape[1]


def _number(module: StoredModule, name: str) -> int:
    tensor = module.take(name, (torch.int32, torch.int64, torch.uint8, torch.bool))
    if tensor.numel() != 1:
        raise module.error(name, "one number expected")
    return int(tensor.item())


def _one_of(module: StoredModule, name: str, allowed: tuple[int, ...]) -> int:
    value = _number(module, name)
    if value not in allowed:
        raise module.error(name, f"{value}; allowed: {', '.join(map(str, allowed))}")
    return value


def _text(module: StoredModule, name: str) -> str:
    return "".join(map(chr, module.take(name, torch.uint8, None).tolist()))
