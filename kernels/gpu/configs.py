"""Which block sizes a kernel runs with: a table per architecture, pruned by shape.

Every row compiles without spills, with int8 matrix instructions; ``tests/gpuless`` asserts that and how
many blocks fit a multiprocessor, and ``benchmarks/gpu_kernels.py`` prints it.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """Of ``gemm.py``.

    Attributes:
        unroll: of the int8 loop. On sm_80, 86 and 89 Triton's prefetch pass makes int8 fragments
            loop-carried and doubles the registers; it gives up on a loop with two products.
        blocks: how many blocks are meant to run at once on one multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    unroll: int = 1
    blocks: int = 1


@dataclass(frozen=True)
class DecodeConfig:
    """Of ``decode.py``; ``blocks`` as above."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks: int = 1


_AMPERE = (
    GemmConfig(64, 64, 64, 4, 3, unroll=2, blocks=2),
    GemmConfig(64, 128, 64, 4, 3, unroll=2, blocks=2),
    GemmConfig(128, 128, 64, 8, 3, unroll=2, blocks=1),
)
_HOPPER = (
    GemmConfig(64, 64, 128, 4, 4, blocks=2),
    GemmConfig(64, 128, 128, 4, 4, blocks=2),
    GemmConfig(128, 128, 128, 8, 3, blocks=2),
    GemmConfig(128, 256, 128, 8, 3, blocks=1),
)
_BLACKWELL = (
    GemmConfig(64, 64, 128, 4, 4, blocks=2),
    GemmConfig(64, 128, 128, 4, 4, blocks=2),
    GemmConfig(128, 128, 128, 8, 3),
)
_CDNA = (
    GemmConfig(64, 64, 64, 4, 2, blocks=2),
    GemmConfig(64, 128, 64, 4, 2, blocks=1),
    GemmConfig(128, 128, 64, 8, 2, blocks=1),
)
GEMM: dict[str, tuple[GemmConfig, ...]] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _AMPERE,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
}

_DECODE = (
    DecodeConfig(16, 128, 8, 4, blocks=2),
    DecodeConfig(32, 128, 8, 4, blocks=2),
    DecodeConfig(64, 128, 8, 4, blocks=2),
)
_DECODE_CDNA = (DecodeConfig(16, 128, 4, 2, blocks=2), DecodeConfig(32, 128, 4, 2, blocks=2))
DECODE: dict[str, tuple[DecodeConfig, ...]] = {
    arch: _DECODE_CDNA if arch.startswith("gfx") else _DECODE for arch in GEMM
}

# Columns of x that a program of the decode kernel looks at together for the scales: as many as stay in
# registers, since each step waits for its loads.
SCALE_BLOCK = 512


def architecture(device: torch.device) -> str:
    """The row of the tables for a device: ``sm_90`` or ``gfx942``.

    Newer architectures are given the newest row below them.
    """
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    number = 10 * properties.major + properties.minor
    known = sorted(int(name[3:]) for name in GEMM if name.startswith("sm_"))
    return f"sm_{max((arch for arch in known if arch <= number), default=known[0])}"


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def gemm_rows(arch: str, dtype: torch.dtype) -> list[GemmConfig]:
    """The rows that serve activations of a dtype.

    Three tf32 products an outlier block need the registers that a tile of 128 x 256 has not.
    """
    limit = 128 if dtype == torch.float32 else 256
    return [config for config in GEMM[arch] if config.block_n <= limit]


def gemm_configs(arch: str, M: int, N: int, dtype: torch.dtype) -> list[GemmConfig]:
    """The rows worth trying for a shape, smallest tiles first.

    Only M's class is looked at, 17-64, 65-1024 or more, so that a graph with dynamic shapes is
    compiled at most once for each.
    """
    rows = gemm_rows(arch, dtype)
    if M <= 64:
        fits = [config for config in rows if config.block_m <= 64]
    elif M <= 1024:
        fits = [config for config in rows if config.block_n <= 128]
    else:
        fits = [config for config in rows if config.block_m > 64]
    return [config for config in fits if config.block_n <= max(64, N)] or fits[:1]


def decode_configs(arch: str, N: int, processors: int) -> list[DecodeConfig]:
    """The rows worth trying: wider tiles only where enough of them are left for every processor."""
    first, *wider = DECODE[arch]
    return [first, *(config for config in wider if N // config.block_n >= 2 * processors)]


def split_k(config: DecodeConfig, N: int, K: int, processors: int) -> int:
    """In how many parts K is split: as many as fill the processors, at most 8.

    Below four times too few tiles a split is not worth the sum that it needs: memory-bound tiles of
    half the processors already take all the bandwidth there is.
    """
    tiles = -(-N // config.block_n)
    parts = 1
    while parts < 8 and tiles * parts * 4 <= processors and 2 * parts * 4 * config.block_k <= K:
        parts *= 2
    return parts
