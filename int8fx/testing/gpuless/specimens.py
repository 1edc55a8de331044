"""Every kernel in every configuration of its table, as arguments for ``nogpu.offline``."""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from int8fx.kernels.formats.grouped import WHOLE
from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.decode import decode_kernel, scan_shape
from int8fx.kernels.gpu.experts import expert_gemm_kernel, list_shape, quantize_experts_kernel
from int8fx.kernels.gpu.experts_gradient import LAUNCH, SHAPE, expert_gradient_kernel
from int8fx.kernels.gpu.gather import launch_shape, quantize_gather_kernel
from int8fx.kernels.gpu.gemm import gemm_kernel
from int8fx.kernels.gpu.grouped_configs import GroupedConfig, group_columns, rows_of_table, step_columns
from int8fx.kernels.gpu.grouped_gemm import grouped_gemm_kernel
from int8fx.kernels.gpu.norm import norm_kernel, norm_shape, serves
from int8fx.kernels.gpu.residues import RESIDUES
from int8fx.kernels.gpu.rotate import columns_room, rotate_kernel, rotate_shape
from int8fx.kernels.gpu.rotated import ProductConfig, of_decode, of_product
from int8fx.kernels.gpu.rotated_gemm import rotated_gemm_kernel
from int8fx.kernels.ops.rotation import block_of
from int8fx.testing.nogpu import alignment, sass
from int8fx.testing.nogpu.offline import compile_kernel

_ITEMSIZES = {"i8": 1, "u8": 1, "i16": 2, "fp16": 2, "bf16": 2, "i32": 4, "fp32": 4, "i64": 8}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NORMS = "rms, rounded", "layer, bias"  # the simplest, and the one that takes most
_CAPACITIES = {"X_CAPACITY": "i32", "W_CAPACITY": "i32"}
# M and K, which the blocks of the gather kernel follow, whether it quantises as well, and a norm.
GATHERS = (
    (128, 512, True, ""),
    (128, 4096, True, ""),
    (4096, 4096, True, ""),
    (128, 14336, True, ""),
    (128, 32768, True, ""),
    (128, 4096, False, ""),
    (128, 4096, True, _NORMS[1]),
    (128, 4096, False, _NORMS[1]),
    *((4096, 4096, later, norm) for later in (True, False) for norm in _NORMS),
    (4096, 8192, True, ""),
    (4096, 8192, True, _NORMS[1]),
    (4096, 5120, True, _NORMS[1]),
    (4096, 14336, True, ""),
    (4096, 14336, True, _NORMS[1]),
    (4096, 14336, False, _NORMS[0]),
)
# Of weights by groups, with a decode step: the group, its zeros, whether rows are in int8, and bits.
GROUPS = (
    (128, "middle", True, 4),
    (128, "integer", True, 4),
    (32, "integer", True, 4),
    (48, "float", True, 4),
    (WHOLE, "middle", True, 4),
    (128, "middle", False, 4),
    (32, "integer", False, 4),
    (96, "offset", False, 4),
    (16, "middle", False, 4),
    (256, "middle", False, 8),
)
# Of rows that are rotated: K, the largest block, static columns, a norm.
ROTATIONS = (
    (576, 64, 8, _NORMS[0]),
    (4096, 64, 0, ""),
    (4096, 64, 8, ""),
    (4096, 64, 8, _NORMS[0]),
    (4096, 64, 64, _NORMS[1]),
    (4096, 16, 8, _NORMS[0]),
    (4096, 32, 8, ""),
    (4096, 128, 8, ""),
    (4096, 256, 8, _NORMS[1]),
    (14336, 64, 8, _NORMS[1]),
    (14336, 256, 8, ""),
    (28672, 64, 8, ""),
)


@dataclass(frozen=True)
class Specimen:
    """One compile.

    Attributes:
        label: of its row in the table.
        arch: ``"sm_90"``.
        blocks: how many are meant to run at once on one multiprocessor.
        multiplies: whether it holds an int8 product.
    """

    label: str
    arch: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    blocks: int
    multiplies: bool = True

    @functools.cached_property
    def inspection(self) -> sass.Inspection:
        """What it compiles to; compiled once in a process."""
        return sass.inspect(self.compiled())

    def compiled(self, unaligned: Collection[str] = ("M", "S")) -> Any:
        """For arguments of which 16 divides all but those of these names."""
        constants = dict(self.constants)
        if "K" in unaligned and "EVEN_K" in constants:
            constants["EVEN_K"] = False
        return compile_kernel(
            self.kernel,
            self.arch,
            self.signature,
            constants,
            self.num_warps,
            self.num_stages,
            (*unaligned, "extended"),
        )

    def misaligned(self, unaligned: Collection[str]) -> list[str]:
        """Its vector accesses whose addresses come from a remainder (``nogpu/alignment.py``)."""
        arguments = [name for name in self.kernel.arg_names if name in self.signature]
        types = {number: self.signature[name] for number, name in enumerate(arguments)}
        itemsizes = {n: _ITEMSIZES[kind[1:]] for n, kind in types.items() if kind.startswith("*")}
        aligned = {
            number
            for number, name in enumerate(arguments)
            if types[number] == "i32" and name not in (*unaligned, "extended")
        }
        return alignment.misaligned(self.compiled(unaligned).asm["ptx"], itemsizes, aligned)

    def __str__(self) -> str:
        return f"{self.label} {self.arch}"


def specimens(arch: str, dtype: str = "fp16") -> Iterator[Specimen]:
    """All of one architecture, for activations of one dtype."""
    for config in configs.gemm_rows(arch, DTYPES[dtype]):
        yield gemm(arch, config, dtype)
    for kind, rows in configs.DECODE[arch].items():
        for decode_config in rows:
            yield decode(arch, kind, decode_config, dtype)
    for config in configs.gemm_rows(arch, DTYPES[dtype]):
        for parts in (2, 3):
            splits = config.block_m == 128 and config.extra_m == 0
            if splits and configs.counts_parts(arch) and (parts == 2 or config.block_n <= 128):
                yield gemm(arch, dataclasses.replace(config, parts=parts), dtype)
    for M, K, quantizes, normed in GATHERS:
        if not normed or takes_rows(K, dtype):
            yield quantize_gather(arch, M, K, dtype, quantizes, norm=normed)
    for K in (768, 4096, 14336):
        for kind in _NORMS:
            if takes_rows(K, dtype):
                yield norm(arch, K, dtype, kind)
    for K in (512, 4096):
        yield quantize_experts(arch, dtype, K)
    for config in configs.expert_rows(arch, DTYPES[dtype]):
        yield experts(arch, config, dtype)
    yield expert_gradient(arch, dtype)
    yield from rotated_specimens(arch, dtype)
    yield from grouped_specimens(arch, dtype)


def rotated_specimens(arch: str, dtype: str = "fp16") -> Iterator[Specimen]:
    """Those of rotated linears."""
    for K, block, columns, kind in ROTATIONS:
        if not kind or takes_rows(K, dtype):
            yield rotate(arch, K, block, columns, kind, dtype)
    for row in configs.DECODE[arch]["rows 16"]:
        parts = 4 if configs.counts_parts(arch) else 1
        yield rotated_product(arch, of_decode(row, parts), row.blocks, dtype)
    for config in configs.gemm_rows(arch, DTYPES[dtype]):
        if config.extra_m:
            continue
        yield rotated_product(arch, of_product(config), config.blocks, dtype)
        if configs.counts_parts(arch) and config.block_m == 128 == config.block_n:
            split = dataclasses.replace(config, parts=2)
            yield rotated_product(arch, of_product(split), 1, dtype)


def grouped_specimens(arch: str, dtype: str = "fp16") -> Iterator[Specimen]:
    """Those of weights by groups: each row of the table with rows of both kinds, and for a decode step
    groups of every kind."""
    first, *others = rows_of_table(arch, DTYPES[dtype])
    for group, zeros, in_int8, bits in GROUPS:
        yield grouped_product(arch, first, group, zeros, in_int8, bits, dtype)
    for row in others:
        yield grouped_product(arch, row, 32, "integer", True, 4, dtype)
        yield grouped_product(arch, row, 128, "integer", False, 4, dtype)
    yield grouped_product(arch, others[-1], 128, "middle", False, 8, dtype)


@functools.cache
def gemm(arch: str, config: configs.GemmConfig, dtype: str = "fp16", **constants: Any) -> Specimen:
    c = config
    return Specimen(
        f"product {c.block_m + c.extra_m}x{c.block_n}x{c.block_k}, "
        f"{f'{c.parts} parts, ' * (c.parts > 1)}{dtype}",
        arch,
        gemm_kernel,
        _linears(dtype)
        | {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32", "count_ptr": "*i32", "columns_ptr": "*i32"}
        | {"x_gathered_ptr": f"*{dtype}", "w_gathered_ptr": f"*{dtype}"}
        | _CAPACITIES
        | {"parts_ptr": "*fp32", "counters_ptr": "*i32", "extended": "i32"},
        {
            "GROUP_M": 8,
            "GROUPED": True,
            "HAS_BIAS": True,
            "HAS_OUTLIERS": True,
            "PRECISION": _precision(arch, dtype),
        }
        | c.constants(K=4096)
        | constants,
        c.num_warps,
        c.num_stages,
        c.blocks if dtype != "fp32" and c.parts == 1 else 1,
    )


@functools.cache
def decode(
    arch: str, kind: str, config: configs.DecodeConfig, dtype: str = "fp16", columns: int = 4096
) -> Specimen:
    """``kind`` as in ``configs.DECODE``, rows with outliers' residues; ``columns`` of a program."""
    quantizes = kind == "quantises"
    itemsize = DTYPES[dtype].itemsize
    return Specimen(
        f"decode {config.block_n}x{config.block_k}, {kind}, {dtype}",
        arch,
        decode_kernel,
        _linears(dtype)
        | {"x_ptr": f"*{dtype}", "threshold": "fp64", "columns_ptr": "*i32"}
        | dict.fromkeys(("x_scale_ptr", "residue_scale_ptr", "parts_ptr"), "*fp32")
        | dict.fromkeys(("x_int8_ptr", "taken_ptr", "counters_ptr"), "*i8")
        | {f"residue{i}_ptr": "*i8" for i in range(RESIDUES)},
        {
            "BLOCK_M": 64 if kind == "rows 64" else 16,
            "SPLIT_K": 4,
            "SUMS": configs.counts_parts(arch),
            "RESIDUES": 0 if quantizes else RESIDUES,
            "QUANTIZE": quantizes,
            "GROUPED": True,
            "HAS_BIAS": True,
            "PRECISION": _precision(arch, dtype),
        }
        | scan_shape(itemsize, config.num_warps, configs.warp_size(arch), columns)
        | config.constants(K=4096),
        config.num_warps,
        config.num_stages,
        config.blocks if dtype != "fp32" else 1,
    )


def takes_rows(K: int, dtype: str) -> bool:
    """Whether rows have their norm taken by a kernel of ours."""
    return serves(torch.empty(1, K, dtype=DTYPES[dtype], device="meta"))


@functools.cache
def norm(
    arch: str, K: int, dtype: str = "fp16", kind: str = "rms", quantizes: bool = True, adds: bool = True
) -> Specimen:
    constants: dict[str, Any] = norm_shape(torch.empty(1, K, device="meta"))
    num_warps = constants.pop("num_warps")
    pointers = {"candidates_ptr": "*i16", "statistics_ptr": "*fp32", "weight_ptr": f"*{dtype}"}
    pointers |= {"x_ptr": f"*{dtype}"}
    absent = {} if adds else {"addend_ptr": None, "sum_ptr": None}
    pointers |= dict.fromkeys(("addend_ptr", "sum_ptr"), f"*{dtype}") if adds else {}
    pointers |= {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32"} if quantizes else {}
    absent |= {} if quantizes else {"x_int8_ptr": None, "x_scale_ptr": None}
    pointers |= {"bias_ptr": f"*{dtype}"} if kind.endswith("bias") else {}
    absent |= {} if kind.endswith("bias") else {"bias_ptr": None}
    return Specimen(
        f"norm ({kind}), K = {K}, {dtype}",
        arch,
        norm_kernel,
        pointers | {"M": "i32", "K": "i32", "eps": "fp64", "threshold": "fp64"},
        constants | absent | {"NORM": kind, "ADDS": adds, "QUANTIZE": quantizes},
        num_warps,
        3,
        blocks=1 if num_warps > 8 else 2,
        multiplies=False,
    )


@functools.cache
def rotate(
    arch: str, K: int, block: int, columns: int, norm: str = "", dtype: str = "fp16", sets: int = 3
) -> Specimen:
    """The kernel that rotates and quantises, for three linears."""
    size = block_of(K, block, "hadamard")
    constants: dict[str, Any] = rotate_shape(K, size, DTYPES[dtype].itemsize)
    num_warps = constants.pop("num_warps")
    pointers = {"x_ptr": f"*{dtype}", "x_columns_ptr": f"*{dtype}", "x_int8_ptr": "*i8"}
    pointers |= {"x_scale_ptr": "*fp32", "sets_ptr": "*i32", "counters_ptr": "*i32"}
    pointers |= {f"columns{index}_ptr": "*i32" for index in range(3)}
    operands = {"addend_ptr": norm, "sum_ptr": norm, "weight_ptr": norm, "bias_ptr": "bias" in norm}
    pointers |= {name: f"*{dtype}" for name, there in operands.items() if there}
    constants |= {name: None for name, there in operands.items() if not there}
    with_columns = f", {columns} columns" if columns else ""
    return Specimen(
        f"rotate by {size}{f' ({norm})' if norm else ''}, K = {K}{with_columns}, {dtype}",
        arch,
        rotate_kernel,
        pointers | {"M": "i32", "K": "i32", "eps": "fp64"},
        constants
        | {"NORM": norm, "ADDS": bool(norm), "COLUMNS": columns, "ROOM": columns_room(columns)}
        | {"SETS": sets if columns else 1, "SIZE": size, "RANDOM": False, "EXACT": dtype == "fp32"}
        | {"COUNTERS": configs.COUNTERS},
        num_warps,
        3,
        blocks=1 if num_warps > 8 or dtype == "fp32" else 2,
        multiplies=False,
    )


@functools.cache
def rotated_product(
    arch: str, config: ProductConfig, blocks: int, dtype: str = "fp16", columns: int = 8
) -> Specimen:
    """Of three linears, which may keep different columns."""
    c = config
    return Specimen(
        f"rotated product {c.block_m}x{c.block_n}x{c.block_k}, "
        f"{f'{c.parts} parts, ' * (c.parts > 1)}{dtype}",
        arch,
        rotated_gemm_kernel,
        _linears(dtype)
        | {f"w_columns{index}_ptr": f"*{dtype}" for index in range(3)}
        | {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32", "x_columns_ptr": f"*{dtype}"}
        | dict.fromkeys(("sets_ptr", "parts_ptr", "counters_ptr"), "*i32"),
        c.constants(K=4096)
        | {"GROUP_M": 8, "GROUPED": True, "SETS": True, "HAS_BIAS": True}
        | {"COLUMNS": columns, "ROOM": columns_room(columns), "PRECISION": _precision(arch, dtype)},
        c.num_warps,
        c.num_stages,
        blocks if dtype != "fp32" and c.parts == 1 else 1,
    )


@functools.cache
def grouped_product(
    arch: str,
    config: GroupedConfig,
    group: int,
    zeros: str,
    in_int8: bool,
    bits: int = 4,
    dtype: str = "fp16",
) -> Specimen:
    """Of three linears, which keep different columns where rows are in int8."""
    block_k = step_columns(group, bits, config.block_k)
    splits = config.block_m == 16 and configs.counts_parts(arch)
    c = dataclasses.replace(config, block_k=block_k, parts=4 if splits else 1)
    columns = 8 if in_int8 else 0
    zero = {"integer": "*u8"}.get(zeros, f"*{dtype}")
    pointers = {f"w{index}_ptr": "*u8" if bits == 4 else "*i8" for index in range(3)}
    pointers |= {f"zero{index}_ptr": zero for index in range(3)}
    for name in ("scale", "w_columns"):
        pointers |= {f"{name}{index}_ptr": f"*{dtype}" for index in range(3)}
    rows = {"x_ptr": "*i8" if in_int8 else f"*{dtype}", "x_columns_ptr": f"*{dtype}"}
    given = _linears(dtype)
    return Specimen(
        f"groups of {group}, {zeros}, {bits} bits, {c.block_m}x{c.block_n}x{c.block_k}, "
        f"{'int8 and ' * in_int8}{dtype}",
        arch,
        grouped_gemm_kernel,
        {name: kind for name, kind in given.items() if not name.startswith("w_scale")}
        | pointers
        | rows
        | {"x_scale_ptr": "*fp32", "parts_ptr": "*fp32", "W": "i32", "G": "i32"}
        | dict.fromkeys(("sets_ptr", "counters_ptr"), "*i32"),
        c.constants(K=4096)
        | {"GROUP": group_columns(group), "ZEROS": zeros, "BITS": bits, "GROUP_M": 8}
        | {"GROUPED": True, "SETS": in_int8, "HAS_BIAS": True}
        | {"COLUMNS": columns, "ROOM": columns_room(columns), "PRECISION": _precision(arch, dtype)},
        c.num_warps,
        c.num_stages,
        c.blocks if dtype != "fp32" else 1,
        multiplies=in_int8,
    )


@functools.cache
def quantize_gather(
    arch: str,
    M: int,
    K: int,
    dtype: str = "fp16",
    quantizes: bool = True,
    N: int = 4096,
    norm: str = "",
    shaped: bool | None = None,
) -> Specimen:
    """``shaped``: whether its shape is that of one that quantises; None: if it does."""
    shaped = quantizes if shaped is None else shaped
    constants = launch_shape(M, K, N, DTYPES[dtype], norm, shaped)
    alone = constants["CHUNKS"] != 1 or dtype == "fp32"
    num_warps = constants.pop("num_warps")
    pointers = {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32", "candidates_ptr": "*i16"}
    pointers |= {f"w{index}_ptr": "*i8" for index in range(3)}
    pointers |= dict.fromkeys(("x_ptr", "x_gathered_ptr", "w_gathered_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("columns_ptr", "count_ptr", "counters_ptr"), "*i32")
    operands = {
        "statistics_ptr": "*fp32" if norm else None,
        "norm_weight_ptr": f"*{dtype}" if norm else None,
        "norm_bias_ptr": f"*{dtype}" if norm.endswith("bias") else None,
    }
    pointers |= {name: kind for name, kind in operands.items() if kind is not None}
    constants |= {name: None for name, kind in operands.items() if kind is None}
    what = "quantise and gather" if quantizes else "gather"
    return Specimen(
        f"{what}{f' ({norm})' if norm else ''}, M = {M}, K = {K}, {dtype}",
        arch,
        quantize_gather_kernel,
        pointers | _sizes() | _CAPACITIES | {"threshold": "fp64"},
        constants | {"NORM": norm, "QUANTIZE": quantizes},
        num_warps,
        3,
        blocks=1 if num_warps > 8 or alone else 2,
        multiplies=False,
    )


@functools.cache
def experts(arch: str, config: configs.GemmConfig, dtype: str = "fp16") -> Specimen:
    """128 of them, whose rows do not come sorted."""
    c = config
    return Specimen(
        f"experts {c.block_m}x{c.block_n}x{c.block_k}, {dtype}",
        arch,
        expert_gemm_kernel,
        _of_experts(dtype)
        | {
            "order_ptr": "*i64",
            "w_ptr": "*i8",
            "w_scale_ptr": "*fp32",
            "y_ptr": f"*{dtype}",
            "N": "i32",
        },
        {
            "BLOCK_E": 256,
            "GROUP_M": 8,
            "HAS_OUTLIERS": True,
            "ORDERED": True,
            "PRECISION": _precision(arch, dtype),
        }
        | c.constants(K=4096),
        c.num_warps,
        c.num_stages,
        c.blocks if dtype != "fp32" else 1,
    )


@functools.cache
def quantize_experts(arch: str, dtype: str = "fp16", K: int = 4096) -> Specimen:
    constants = list_shape(4096, K, DTYPES[dtype])
    num_warps = constants.pop("num_warps")
    return Specimen(
        f"quantise and list, experts, K = {K}, {dtype}",
        arch,
        quantize_experts_kernel,
        _of_experts(dtype) | {"candidates_ptr": "*i16", "threshold": "fp64"},
        constants | {"QUANTIZE": True, "BLOCK_E": 256},
        num_warps,
        3,
        blocks=2 if num_warps <= 8 else 1,
        multiplies=False,
    )


@functools.cache
def expert_gradient(arch: str, dtype: str = "fp16") -> Specimen:
    pointers = {
        "grad_ptr": f"*{dtype}",
        "grad_x_ptr": f"*{dtype}",
        "w_ptr": "*i8",
        "w_scale_ptr": "*fp32",
    }
    return Specimen(
        f"gradient, experts, {dtype}",
        arch,
        expert_gradient_kernel,
        pointers
        | {"ends_ptr": "*i32", "order_ptr": "*i64"}
        | dict.fromkeys(("S", "N", "K", "E"), "i32"),
        SHAPE | {"BLOCK_E": 256, "ORDERED": True, "PRECISION": _precision(arch, dtype)},
        LAUNCH["num_warps"],
        LAUNCH["num_stages"],
        blocks=2,
        multiplies=False,
    )


def _of_experts(dtype: str) -> dict[str, str]:
    pointers = {"x_ptr": f"*{dtype}", "x_int8_ptr": "*i8", "x_scale_ptr": "*fp32"}
    pointers |= dict.fromkeys(("columns_ptr", "count_ptr", "ends_ptr"), "*i32")
    return pointers | dict.fromkeys(("S", "K", "E"), "i32")


def _linears(dtype: str) -> dict[str, str]:
    types = {"w": "*i8", "w_scale": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}"}
    pointers = {f"{name}{i}_ptr": type_ for name, type_ in types.items() for i in range(3)}
    return pointers | _sizes()


def _sizes() -> dict[str, str]:
    return dict.fromkeys(("M", "N0", "N1", "N2", "K"), "i32")


def _precision(arch: str, dtype: str) -> str:
    return "tf32x3" if dtype == "fp32" and arch.startswith("sm_") else "ieee"
