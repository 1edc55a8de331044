"""Which block sizes a kernel runs with: a table per architecture, pruned by shape.

Every row compiles without spills, with int8 matrix instructions; ``tests/gpuless`` asserts that and how
many blocks fit a multiprocessor, and ``benchmarks/gpu_kernels.py`` prints it.
"""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """Of ``gemm.py`` and ``experts.py``.

    Attributes:
        unroll: of the int8 loop. On sm_80, 86 and 89 Triton's prefetch pass makes int8 fragments
            loop-carried and doubles the registers; it gives up on a loop with two products.
        blocks: how many blocks are meant to run at once on one multiprocessor.
        parts: in how many K is split, which a shape decides; None where the kernel cannot.
        extra_m: rows that an extended tile has more (``mixed_tiles.py``), half of ``block_m``; or 0.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    unroll: int = 1
    blocks: int = 1
    parts: int | None = 1
    extra_m: int = 0

    def constants(self, K: int) -> dict[str, int | bool]:
        """The kernel's constants, for rows of K elements."""
        constants: dict[str, int | bool] = {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "UNROLL": self.unroll,
            "EVEN_K": K % (self.block_k * self.unroll) == 0,
        }
        if self.parts is None:
            return constants
        return constants | {"SPLIT_K": self.parts, "EXTRA_M": self.extra_m}


@dataclass(frozen=True)
class DecodeConfig:
    """Of ``decode.py``; ``blocks`` as above."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks: int = 1

    def constants(self, K: int) -> dict[str, int | bool]:
        """The kernel's constants, for rows of K elements."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "EVEN_K": K % self.block_k == 0,
        }


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
    GemmConfig(128, 256, 128, 8, 3, blocks=1, extra_m=64),
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

# Of experts.py. An expert may have few rows, and then reading its weight is what takes the time; and
# outlier columns, which are gathered inside the product, want registers of their own.
_EXPERTS_16 = GemmConfig(16, 64, 128, 4, 4, blocks=3, parts=None)
_CDNA_EXPERTS_16 = GemmConfig(16, 32, 128, 4, 2, blocks=2, parts=None)


def _for_experts(arch: str) -> tuple[GemmConfig, ...]:
    few = _CDNA_EXPERTS_16 if arch.startswith("gfx") else _EXPERTS_16
    many = [
        dataclasses.replace(row, blocks=min(row.blocks, 128 // row.block_m), parts=None)
        for row in GEMM[arch]
        if row.block_n <= 128
    ]
    return (few, *many)


EXPERTS: dict[str, tuple[GemmConfig, ...]] = {arch: _for_experts(arch) for arch in GEMM}

_MAX_PARTS = 8
_ALIGNED = 16  # what Triton takes for aligned, in elements
# Rows of a product, by class: up to an entry, or more than the last.
_CLASSES = (64, 128, 256, 512, 1024)
COUNTERS = 256  # of the tiles whose K is split
# What share of the processors wide tiles have to fill, by the parts of each, whose sum takes time.
_MANY = {1: 0.7, 2: 0.75}
# One token in a tile of 16 rows; then tokens with their outliers' residues in one of 64; then 2 to 16
# rows that each program quantises, which wants few and large programs.
_ROWS_16 = (DecodeConfig(32, 256, 4, 4, blocks=2), DecodeConfig(64, 128, 4, 4, blocks=3))
_ROWS_64 = (DecodeConfig(64, 128, 4, 4, blocks=2),)
_QUANTIZING = (DecodeConfig(128, 128, 8, 4), DecodeConfig(256, 128, 8, 3))
# There a program of 256 threads has 128 registers at most, which a tile of 128 x 128 spills.
_SM_120_QUANTIZING = (DecodeConfig(64, 128, 4, 4, blocks=3), _QUANTIZING[1])
_CDNA_ROWS_16 = (DecodeConfig(16, 256, 4, 2, blocks=2), DecodeConfig(32, 128, 4, 2, blocks=2))
_CDNA_ROWS_64 = (DecodeConfig(64, 128, 4, 2, blocks=1),)
_CDNA_QUANTIZING = (DecodeConfig(64, 128, 4, 2), DecodeConfig(128, 128, 4, 2))
DECODE: dict[str, dict[str, tuple[DecodeConfig, ...]]] = {
    arch: {"rows 16": _CDNA_ROWS_16, "rows 64": _CDNA_ROWS_64, "quantises": _CDNA_QUANTIZING}
    if arch.startswith("gfx")
    else {
        "rows 16": _ROWS_16,
        "rows 64": _ROWS_64,
        "quantises": _SM_120_QUANTIZING if arch == "sm_120" else _QUANTIZING,
    }
    for arch in GEMM
}


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


def warp_size(arch: str) -> int:
    return 64 if arch.startswith("gfx") else 32


def counts_parts(arch: str) -> bool:
    """Whether programs that share a tile may count themselves, so that the last one adds up the parts.

    The count has to come after the stores of all waves of a program. On gfx9 Triton's barrier does not
    wait for stores, and the atomic after it waits for those of its own wave alone.
    """
    return not arch.startswith("gfx")


def gemm_rows(arch: str, dtype: torch.dtype) -> list[GemmConfig]:
    """The rows that serve activations of a dtype.

    Three tf32 products an outlier block need the registers that a tile of 128 x 256 has not.
    """
    limit = 128 if dtype == torch.float32 else 256
    return [config for config in GEMM[arch] if config.block_n <= limit]


def row_class(M: int) -> int | None:
    """The most rows of M's class; None, it has no end."""
    return next((most for most in _CLASSES if most >= M), None)


def gemm_configs(
    arch: str, M: int, N: int, K: int, dtype: torch.dtype, processors: int
) -> list[GemmConfig]:
    """The rows worth trying for a shape, smallest tiles first, the best guess last.

    Only M's class is looked at, so that a graph with dynamic shapes is compiled at most once for each.
    Tiles wider than 128 halve the traffic of x, and the programs: where enough are left, or M is large
    anyway. Only then there are extended ones, if rows of the result are aligned: elements that are
    stored one by one have an address each, for which extended tiles have no registers.
    """
    passed = sum(each < M for each in _CLASSES)
    is_last = passed == len(_CLASSES)
    most = _CLASSES[min(passed, len(_CLASSES) - 1)]
    chosen = []
    for config in gemm_rows(arch, dtype):
        tiles = -(-most // config.block_m) * -(-N // config.block_n)
        splits = counts_parts(arch) and not is_last
        parts = gemm_parts(config, tiles, K, processors) if splits else 1
        enough = config.block_n <= 128 or is_last or tiles * parts >= _MANY[parts] * processors
        served = config.extra_m == 0 or (is_last and N % _ALIGNED == 0)
        if served and enough and (config.block_m > 64 if is_last else config.block_m <= most):
            chosen.append(dataclasses.replace(config, parts=parts))
    return [config for config in chosen if config.block_n <= max(64, N)] or chosen[:1]


def extended_tiles(M: int, tiles_n: int, processors: int, block_m: int, extra_m: int) -> int:
    """How many tiles in each column of tiles are extended: as many as let all processors end together.

    An extended tile takes as long as three halves of a plain one. What a processor has to do, in
    halves, it does in threes and, where those do not fit, in one or two twos. Extended tiles are whole.

    Args:
        M: rows; a SymInt gives a SymInt.
        tiles_n: columns of tiles.
        block_m: rows of a plain tile.
        extra_m: how many rows more an extended one has; 0, there are none.
    """
    if extra_m == 0:
        return 0
    halves = -(-(-(-M // extra_m) * tiles_n) // processors)
    extended = (halves // 3 - halves % 3 % 2) * processors // tiles_n
    return torch.sym_min(torch.sym_max(extended, 0), M // (block_m + extra_m))


def product_tiles(M: int, tiles_n: int, processors: int, block_m: int, extra_m: int) -> tuple[int, int]:
    """How many tiles of a product are extended, and how many are plain; see ``extended_tiles``."""
    extended = extended_tiles(M, tiles_n, processors, block_m, extra_m)
    rows = M - extended * (block_m + extra_m)
    return extended * tiles_n, -(-rows // block_m) * tiles_n


def gemm_parts(config: GemmConfig, tiles: int, K: int, processors: int) -> int:
    """In how many parts a product splits K: two where all processors have room for them, and more in
    three quarters of them.

    Each part is written and read in fp32, except that of two only one is (``split.py``): three of a
    tile wider than 128 are more traffic than its operands.
    """
    most = 1 if 2 * tiles > COUNTERS else 2 if config.block_n > 128 else _MAX_PARTS
    enough = min(most, K // (4 * config.block_k * config.unroll))
    fits = [parts for parts in range(3, enough + 1) if 4 * tiles * parts <= 3 * processors]
    return max(fits, default=2 if enough >= 2 and 2 * tiles <= processors else 1)


def expert_rows(arch: str, dtype: torch.dtype) -> list[GemmConfig]:
    """The rows of experts.py that serve activations of a dtype; see ``gemm_rows``."""
    limit = 64 if dtype == torch.float32 else 128
    return [config for config in EXPERTS[arch] if config.block_n <= limit]


def expert_configs(arch: str, S: int, E: int, N: int, dtype: torch.dtype) -> list[GemmConfig]:
    """The rows worth trying for S rows that E experts share, smallest tiles first.

    Only the class of S is looked at: up to 16, up to 64 or more rows for each expert.
    """
    rows = expert_rows(arch, dtype)
    if S <= 16 * E:
        fits = [config for config in rows if config.block_m == 16]
    elif S <= 64 * E:
        fits = [config for config in rows if config.block_m == 64]
    else:
        fits = [config for config in rows if config.block_m >= 64]
    return [config for config in fits if config.block_n <= max(64, N)] or fits[:1]


def decode_configs(arch: str, kind: str, N: int, K: int, processors: int) -> list[DecodeConfig]:
    """The rows worth trying for a kind of decode: wider tiles only where enough programs are left.

    A program that quantises repeats what the others do, except that it quantises its own part of K
    alone: few and wide tiles, each in many parts, until two of three processors have a program. A
    program that only reads shares its processor with others.
    """

    def enough(config: DecodeConfig) -> bool:
        tiles = N // config.block_n
        if kind == "quantises":
            return 3 * tiles * split_k(kind, config, N, K, processors) >= 2 * processors
        return tiles >= 2 * processors

    first, *wider = DECODE[arch][kind]
    return [first, *filter(enough, wider)]


def split_k(kind: str, config: DecodeConfig, N: int, K: int, processors: int) -> int:
    """In how many parts K is split: as many as fill the processors, at most 8.

    Where a program only reads, a split is not worth the sum that it needs until four times too few
    tiles: memory-bound tiles of half the processors already take all the bandwidth there is.
    """
    tiles = -(-N // config.block_n)
    worth = 2 if kind == "quantises" else 4
    parts = 1
    while (
        parts < _MAX_PARTS
        and tiles * parts * worth <= processors
        and 2 * parts * 4 * config.block_k <= K
    ):
        parts *= 2
    return parts
