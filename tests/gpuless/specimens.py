"""Every kernel in every configuration of its table, as arguments for ``nogpu.offline``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nogpu.offline import compile_kernel

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.decode import MAX_M, decode_kernel
from int8fx.kernels.gpu.gather import launch_shape, quantize_gather_kernel
from int8fx.kernels.gpu.gemm import gemm_kernel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (512, 4096)  # the block of the gather kernel, and so its registers, follow K


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

    def compile(self) -> Any:
        return compile_kernel(
            self.kernel,
            self.arch,
            self.signature,
            self.constants,
            self.num_warps,
            self.num_stages,
            unaligned=("M",),
        )

    def __str__(self) -> str:
        return f"{self.label} {self.arch}"


def specimens(arch: str, dtype: str = "fp16") -> Iterator[Specimen]:
    """All of one architecture, for activations of one dtype."""
    for config in configs.gemm_rows(arch, DTYPES[dtype]):
        yield gemm(arch, config, dtype)
    for decode_config in configs.DECODE[arch]:
        for quantizes in (True, False):
            yield decode(arch, decode_config, dtype, quantizes)
    for quantizes in (True, False):
        for K in WIDTHS:
            yield quantize_gather(arch, dtype, quantizes, K)


def gemm(arch: str, config: configs.GemmConfig, dtype: str = "fp16", **constants: Any) -> Specimen:
    c = config
    return Specimen(
        f"product {c.block_m}x{c.block_n}x{c.block_k}, {dtype}",
        arch,
        gemm_kernel,
        _linears(dtype)
        | {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32", "count_ptr": "*i32"}
        | {"x_gathered_ptr": f"*{dtype}", "w_gathered_ptr": f"*{dtype}", "CAPACITY": "i32"},
        {
            "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n,
            "BLOCK_K": c.block_k,
            "BLOCK_O": 32,
            "GROUP_M": 8,
            "UNROLL": c.unroll,
            "GROUPED": True,
            "EVEN_K": True,
            "HAS_BIAS": True,
            "HAS_OUTLIERS": True,
            "PRECISION": _precision(arch, dtype),
        }
        | constants,
        c.num_warps,
        c.num_stages,
        c.blocks if dtype != "fp32" else 1,
    )


def decode(
    arch: str, config: configs.DecodeConfig, dtype: str = "fp16", quantizes: bool = True
) -> Specimen:
    return Specimen(
        f"decode 16x{config.block_n}x{config.block_k}{', quantises' * quantizes}, {dtype}",
        arch,
        decode_kernel,
        _linears(dtype)
        | {"x_ptr": f"*{dtype}", "threshold": "fp64"}
        | {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32"},
        {
            "BLOCK_M": MAX_M,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "SPLIT_K": 1,
            "SCALE_BLOCK": configs.SCALE_BLOCK,
            "QUANTIZE": quantizes,
            "GROUPED": True,
            "EVEN_K": True,
            "HAS_BIAS": True,
            "HAS_OUTLIERS": True,
            "COLUMN": quantizes,
            "PRECISION": _precision(arch, dtype),
        },
        config.num_warps,
        config.num_stages,
        config.blocks if dtype != "fp32" else 1,
    )


def quantize_gather(arch: str, dtype: str = "fp16", quantizes: bool = True, K: int = 4096) -> Specimen:
    constants = launch_shape(K)
    num_warps = constants.pop("num_warps")
    pointers = {"x_int8_ptr": "*i8", "x_scale_ptr": "*fp32", "witness_ptr": "*i16"}
    pointers |= {f"w{index}_ptr": "*i8" for index in range(3)}
    pointers |= dict.fromkeys(("x_ptr", "x_gathered_ptr", "w_gathered_ptr"), f"*{dtype}")
    pointers |= {"columns_ptr": "*i32", "count_ptr": "*i32"}
    return Specimen(
        f"{'quantise and gather' if quantizes else 'gather'}, K = {K}, {dtype}",
        arch,
        quantize_gather_kernel,
        pointers | _sizes() | {"CAPACITY": "i32", "threshold": "fp64"},
        constants | {"QUANTIZE": quantizes},
        num_warps,
        3,
        blocks=2,
        multiplies=False,
    )


def _linears(dtype: str) -> dict[str, str]:
    types = {"w": "*i8", "w_scale": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}"}
    pointers = {f"{name}{i}_ptr": type_ for name, type_ in types.items() for i in range(3)}
    return pointers | _sizes()


def _sizes() -> dict[str, str]:
    return dict.fromkeys(("M", "N0", "N1", "N2", "K"), "i32")


def _precision(arch: str, dtype: str) -> str:
    return "tf32x3" if dtype == "fp32" and arch.startswith("sm_") else "ieee"
