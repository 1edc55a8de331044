"""Block sizes of ``grouped_gemm.py``: a table for each architecture, pruned by shape."""

import dataclasses
from dataclasses import dataclass

import torch

from int8fx.kernels.formats.grouped import WHOLE
from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.grouped_packing import RUN
from int8fx.kernels.ops.limits import DECODE_ROWS

_MOST_PARTS = 4  # more roundings of a sum than the bound of ops/grouped_linear.py has room for
_MANY_ROWS = 2048  # what more rows than any class has are taken for
_LEAST_COLUMNS = 512  # of a part of K


@dataclass(frozen=True)
class GroupedConfig:
    """A row of the tables.

    Attributes:
        block_k: codes of a step; the table has the most.
        blocks: how many blocks are meant to run at once on one multiprocessor.
        parts: in how many K is split, which a shape decides.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks: int = 1
    parts: int = 1

    def constants(self, K: int) -> dict[str, int | bool]:
        """The kernel's constants, for rows of K elements."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "SPLIT_K": self.parts,
            "EVEN_K": K % self.block_k == 0,
        }


# A decode step waits for memory: many small blocks at once, with several steps of weights on the way.
_DECODE = (GroupedConfig(16, 32, 128, 4, 5, blocks=3), GroupedConfig(16, 64, 128, 4, 5, blocks=3))
_CDNA_DECODE = (GroupedConfig(16, 32, 128, 4, 2, blocks=2),)
# Two accumulators, of a group and of all, and the scales of two channels in eight: larger tiles spill.
_MANY = (
    GroupedConfig(64, 64, 128, 4, 3, blocks=2),
    GroupedConfig(64, 128, 128, 8, 3),
    GroupedConfig(128, 64, 128, 8, 3),
)
_BLACKWELL_MANY = (GroupedConfig(64, 64, 128, 8, 3), *_MANY[1:])
_CDNA_MANY = (GroupedConfig(64, 64, 64, 4, 2), GroupedConfig(128, 64, 64, 8, 2))
GROUPED: dict[str, tuple[GroupedConfig, ...]] = {
    arch: (*_CDNA_DECODE, *_CDNA_MANY)
    if arch.startswith("gfx")
    else (*_DECODE, *(_BLACKWELL_MANY if arch == "sm_100" else _MANY))
    for arch in configs.GEMM
}


def group_columns(group: int) -> int:
    """The group as the kernel takes it: 0 for all of K."""
    return 0 if group == WHOLE else group


def step_columns(group: int, bits: int, most: int) -> int:
    """BLOCK_K: codes of a step, a power of two that divides the group, or of 4 bits two runs."""
    divides = most if group == WHOLE else min(most, group & -group)
    return max(divides, 2 * RUN) if bits == 4 else divides


def rows_of_table(arch: str, dtype: torch.dtype) -> list[GroupedConfig]:
    """The rows that serve activations of a dtype. Of fp32 operands are twice as large, and three tf32
    products take as many registers."""
    if dtype != torch.float32:
        return list(GROUPED[arch])
    few = [row for row in GROUPED[arch] if row.block_m == DECODE_ROWS]
    many = [row for row in GROUPED[arch] if row not in few and row.block_n <= 64]
    smaller = [*few, *(dataclasses.replace(row, num_warps=8) for row in many)]
    return [dataclasses.replace(row, block_k=min(64, row.block_k)) for row in smaller]


def grouped_configs(
    arch: str, M: int, N: int, K: int, group: int, bits: int, dtype: torch.dtype, processors: int
) -> list[GroupedConfig]:
    """The rows worth trying for a shape, smallest tiles first, the best guess last.

    Only M's class is looked at, so that a graph with dynamic shapes is compiled at most once for each.
    """
    few = bool(M <= DECODE_ROWS)  # of a SymInt this is a guard
    rows = [row for row in rows_of_table(arch, dtype) if (row.block_m == DECODE_ROWS) is few]
    most = DECODE_ROWS if few else configs.row_class(M) or _MANY_ROWS
    first, *larger = (
        dataclasses.replace(row, block_k=step_columns(group, bits, row.block_k)) for row in rows
    )

    def fills(row: GroupedConfig) -> bool:
        tiles = -(-most // row.block_m) * (N // row.block_n)
        return row.block_m <= max(64, most) and tiles >= (2 if few else 1) * processors

    chosen = [first, *filter(fills, larger)]
    if not few or not configs.counts_parts(arch):
        return chosen
    return [dataclasses.replace(row, parts=_parts(row, N, K, processors)) for row in chosen]


def _parts(row: GroupedConfig, N: int, K: int, processors: int) -> int:
    """In how many parts a decode step splits K: until there are two blocks for each processor."""
    tiles = -(-N // row.block_n)
    if tiles > configs.COUNTERS:
        return 1
    parts = 1
    while parts < _MOST_PARTS and tiles * parts < 2 * processors and 2 * parts * _LEAST_COLUMNS <= K:
        parts *= 2
    return parts
