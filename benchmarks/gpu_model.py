"""A cost model of the GPU kernels: from compiled code and data sheets to microseconds.

    time of a launch = gap + max(memory, L2, tensor cores, instruction issue, operand traffic)

It ranks configurations and shows what limits them. It is not a measurement: within 30 % at best, and
blind to everything that it does not name. Every constant is in this file.
"""

import math
from dataclasses import dataclass
from typing import Any

# Shares of a data sheet's rate that good kernels reach.
DRAM_SHARE = 0.88
TENSOR_SHARE = 0.80
ISSUE_SHARE = 0.70
# Cycles of a tile before its loop runs full and after it: addresses, first loads, epilogue.
TILE_CYCLES = 1500
# Cycles from a load to its value, from L2.
L2_LATENCY = 600
# What the last program of a tile waits for: its own part to be written, its count, all the parts.
SUM_LATENCIES = 3
# Bytes of a gathered int8 weight: a whole sector comes for each.
SECTOR = 32


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        arch: whose compiled code stands for it.
        processors: multiprocessors, or compute units.
        clock: sustained, GHz.
        int8, fp16: dense operations a cycle of one processor.
        dram, l2: bytes a second.
        port: bytes a cycle from L2 into one processor.
        issue: warp instructions a cycle of one processor.
        gap: seconds from one kernel to the next inside a CUDA graph.
    """

    name: str
    arch: str
    processors: int
    clock: float
    int8: int
    fp16: int
    dram: float
    l2: float
    port: int = 64
    issue: int = 4
    gap: float = 1.5e-6


GPUS = (
    Gpu("H100 SXM", "sm_90", 132, 1.70, 8192, 4096, 3.35e12, 7.5e12),
    Gpu("A100 SXM 80GB", "sm_80", 108, 1.41, 4096, 2048, 2.04e12, 4.0e12, gap=2.0e-6),
    Gpu("L40S", "sm_89", 142, 2.30, 2048, 1024, 0.864e12, 4.0e12),
    Gpu("RTX 4090", "sm_89", 128, 2.50, 2048, 1024, 1.01e12, 4.5e12),
    Gpu("MI300X", "gfx942", 304, 2.00, 4096, 2048, 5.3e12, 10e12, gap=3.0e-6),
)


@dataclass(frozen=True)
class Time:
    """Seconds, and what they are spent on."""

    seconds: float
    limit: str


def streaming(gpu: Gpu, nbytes: float) -> float:
    """A kernel that only moves bytes."""
    return gpu.gap + nbytes / (gpu.dram * DRAM_SHARE)


def matmul_fp16(gpu: Gpu, M: int, N: int, K: int) -> float:
    """cuBLAS at its best: the slower of tensor cores and memory, no tile effects."""
    operations = 2 * M * N * K / (gpu.processors * gpu.clock * 1e9 * gpu.fp16 * TENSOR_SHARE)
    return gpu.gap + max(operations, 2 * (M * K + N * K + M * N) / (gpu.dram * DRAM_SHARE))


def matmul_int8(gpu: Gpu, M: int, N: int, K: int) -> float:
    """As ``matmul_fp16``: a product that no tile, and no L2, holds up."""
    operations = 2 * M * N * K / (gpu.processors * gpu.clock * 1e9 * gpu.int8 * TENSOR_SHARE)
    return gpu.gap + max(operations, (M * K + N * K + 2 * M * N) / (gpu.dram * DRAM_SHARE))


def product(gpu: Gpu, config: Any, seen: Any, M: int, N: int, K: int, outliers: int) -> Time:
    """``gemm.py`` with one row of its table.

    Args:
        config: a ``GemmConfig``.
        seen: its ``sass.Inspection``.
    """
    c = config
    tiles = math.ceil(M / c.block_m) * math.ceil(N / c.block_n)
    blocks = seen.blocks_per_multiprocessor
    waves = math.ceil(tiles / (gpu.processors * blocks))
    together = min(blocks, math.ceil(tiles / gpu.processors))
    step_k = c.block_k * c.unroll
    step = {
        "tensor cores": 2 * c.block_m * c.block_n * step_k / (gpu.int8 * TENSOR_SHARE),
        "operand traffic": (c.block_m + c.block_n) * step_k / gpu.port,
        "issue": _loop_instructions(seen) * c.num_warps / (gpu.issue * ISSUE_SHARE),
    }
    slowest = max(step, key=lambda name: step[name])
    tail = 2 * c.block_m * c.block_n * outliers / (gpu.fp16 * TENSOR_SHARE)
    cycles = waves * together * (math.ceil(K / step_k) * step[slowest] + tail + TILE_CYCLES)
    nbytes = (M + N) * K + 2 * M * N + 2 * outliers * (M + N)
    limits = {
        slowest: cycles / (gpu.clock * 1e9),
        "memory": nbytes / (gpu.dram * DRAM_SHARE),
        "L2": tiles * (c.block_m + c.block_n) * K / gpu.l2,
    }
    limit = max(limits, key=lambda name: limits[name])
    return Time(gpu.gap + limits[limit], limit)


def _loop_instructions(seen: Any) -> int:
    """Of the int8 loop; AMD's code is not split into loops, and its issue is not modelled."""
    loops = [loop for loop in seen.loops if any("IMMA" in n or "IGMMA" in n for n in loop)]
    return sum(loops[-1].values()) if loops else 0


def quantize_gather(
    gpu: Gpu, seen: Any, shape: dict[str, int], M: int, N: int, K: int, outliers: int, quantizes: bool
) -> Time:
    """``gather.py``; every row has an outlier in each of its columns.

    Quantising, x is read twice (once from L2) and int8 written. Else x comes in sectors, one for each
    outlier. Outliers are written, and weights gathered.

    Args:
        seen: its ``sass.Inspection``.
        shape: its ``launch_shape``.
    """
    rows = (3 * M * K + 4 * M) if quantizes else M * min(SECTOR * outliers, 2 * K)
    nbytes = rows + 4 * outliers * M + N * outliers * (SECTOR + 2)
    x_programs, w_programs = math.ceil(M / shape["ROWS"]), math.ceil(N / shape["WEIGHT_ROWS"])
    of_x, of_w = _gather_instructions(seen, shape, K, outliers, quantizes)
    issued = of_x * math.ceil(x_programs / gpu.processors)
    issued += of_w * math.ceil(w_programs / gpu.processors)
    limits = {
        "memory": nbytes / (gpu.dram * DRAM_SHARE),
        "issue": _issue(gpu, issued * shape["num_warps"]),
    }
    return _slowest(gpu, limits)


def _gather_instructions(
    seen: Any, shape: dict[str, int], K: int, outliers: int, quantizes: bool
) -> tuple[int, int]:
    """Of a warp that takes rows of x, and of one that takes rows of a weight; 0 on AMD."""
    if not seen.loops:
        return 0, 0
    loops = [loop for loop in seen.loops if sum(loop.values()) > 1]
    once = sum(seen.opcodes.values()) - seen.opcodes.get("NOP", 0) - sum(map(_size, loops))
    kinds = {"SHFL": 16 * shape["LIST_BLOCK"]}  # the list
    if quantizes:
        kinds |= {"HMNMX": shape["BLOCK_K"], "FFMA": shape["BLOCK_K"]}  # absmax, then int8
    kinds |= {"FSETP": shape["LOOK_BLOCK"]}  # the witness
    for name, block in kinds.items():
        loop = next(loop for loop in loops if any(n.startswith(name) for n in loop))
        loops.remove(loop)
        passes = math.ceil(K / block) * _size(loop)
        kinds[name] = passes
    of_x, of_w = sorted(map(_size, loops))  # what gathers; a program has more rows of a weight
    steps = math.ceil(outliers / shape["BLOCK_O"])
    listing = once + kinds["SHFL"] + kinds["FSETP"]
    rows = kinds.get("HMNMX", 0) + kinds.get("FFMA", 0)
    return listing + rows + steps * of_x, listing + steps * of_w


def _size(loop: dict[str, int]) -> int:
    return sum(loop.values())


def _issue(gpu: Gpu, instructions: float) -> float:
    """Seconds that the busiest processor takes to issue them."""
    return instructions / (gpu.issue * ISSUE_SHARE * gpu.clock * 1e9)


def _slowest(gpu: Gpu, limits: dict[str, float]) -> Time:
    limit = max(limits, key=lambda name: limits[name])
    return Time(gpu.gap + limits[limit], limit)


# What the kernel of a norm moves, bytes an element: through memory, x in and results out, and what it
# stores for outliers alone (the witness, and the dump of `scattered`), which stays in L2. It reads x up
# to three times; again is from a processor's own cache.
MOVES = {
    "fp16": (4, 0),  # h
    "column": (4, 2),  # h
    "token": (5, 2),  # h, x_int8
    "scattered": (3, 4),  # x_int8
    "none": (3, 0),  # x_int8
    "digits": (6, 0),  # x_int8 and three digits
}


def norm(gpu: Gpu, M: int, K: int, kind: str, instructions: int, warps: int) -> Time:
    """Inductor's norm, and what it fuses with it.

    Args:
        kind: a key of ``MOVES``.
        instructions: of a warp, for a row.
        warps: of a row.
    """
    moved, more = MOVES[kind]
    limits = {
        "memory": moved * M * K / (gpu.dram * DRAM_SHARE),
        "L2": (moved + more) * M * K / gpu.l2,
        "issue": _issue(gpu, math.ceil(M / gpu.processors) * instructions * warps),
    }
    return _slowest(gpu, limits)


def scattered_gather(gpu: Gpu, M: int, N: int, K: int, outliers: int) -> float:
    """What would gather if a norm left marks in x_int8, and its outliers by column: a sector of x_int8
    comes for each outlier."""
    nbytes = M * min(SECTOR * outliers, K) + 4 * outliers * M + N * outliers * (SECTOR + 2)
    return streaming(gpu, nbytes)


def decode(
    gpu: Gpu, config: Any, seen: Any, M: int, N: int, K: int, parts: int, rows: int, outliers: int = 0
) -> Time:
    """``decode.py``.

    Args:
        config: a ``DecodeConfig``.
        seen: its ``sass.Inspection``.
        parts: SPLIT_K; the partial sums are written, and read by the program that comes last to a tile.
        rows: BLOCK_M, which are loaded beside each tile of the weight.
        outliers: the columns that a program which quantises adds at the end; 0, it is given rows.
    """
    c = config
    programs = math.ceil(N / c.block_n) * parts
    blocks = seen.blocks_per_multiprocessor
    waves = math.ceil(programs / (gpu.processors * blocks))
    together = min(blocks, math.ceil(programs / gpu.processors))
    share = waves * together * c.num_warps / (gpu.issue * ISSUE_SHARE)
    issue = math.ceil(K / parts / c.block_k) * _loop_instructions(seen) * share
    around = 0.0
    if outliers:
        for loop, times, latencies in _quantizing_loops(seen, c.num_warps, K, parts, outliers):
            around += times * (loop * share + waves * latencies * L2_LATENCY)
    if parts > 1:
        around += waves * SUM_LATENCIES * L2_LATENCY
    sums = 2 * 4 * parts * M * N if parts > 1 else 0
    limits = {
        "memory": (N * K + 2 * M * (N + K)) / (gpu.dram * DRAM_SHARE),
        "issue": issue / (gpu.clock * 1e9),
        "L2": (programs * (rows + c.block_n) * K / parts + sums) / gpu.l2,
        "tensor cores": 2 * rows * N * K / (gpu.processors * gpu.clock * 1e9 * gpu.int8 * TENSOR_SHARE),
    }
    limit = max(limits, key=lambda name: limits[name])
    seconds = around / (gpu.clock * 1e9)
    if seconds > limits[limit]:
        return Time(gpu.gap + seconds + limits[limit], "quantising" if outliers else "the sum")
    return Time(gpu.gap + seconds + limits[limit], limit)


def _quantizing_loops(
    seen: Any, num_warps: int, K: int, parts: int, outliers: int
) -> list[tuple[int, int, int]]:
    """What a program that quantises does besides the product, for fp16: of each of its loops the
    instructions of a warp, how often it runs, and how many loads it waits for, one after another."""
    from int8fx.kernels.gpu.decode import look_shape

    shape = look_shape(2, num_warps, 32, K // parts)
    kinds = {
        "FFMA": (math.ceil(K / parts / shape["QUANTIZE_BLOCK"]), 1),  # quantise
        "HMNMX": (math.ceil(K / shape["LOOK_BLOCK"]), 1),  # columns and scales
        "HMMA": (math.ceil(math.ceil(outliers / parts) / shape["BLOCK_O"]), 2),
        "SHFL": (math.ceil(K / (16 * shape["LIST_BLOCK"])), 1),  # the list
    }
    found = []
    for loop in seen.loops:
        name = next((name for name in kinds if any(n.startswith(name) for n in loop)), None)
        if name is not None and not any("IMMA" in n for n in loop):
            found.append((sum(loop.values()), *kinds.pop(name)))
    if seen.loops and kinds:
        raise ValueError(f"no loop with {', '.join(kinds)} in {seen.loops}")
    return found
