"""A cost model of the GPU kernels: from compiled code and data sheets to microseconds.

    time of a launch = gap + max(memory, L2, tensor cores, instruction issue, operand traffic)
                           + loads that wait for one another, where a kernel starts or ends with such

It ranks configurations and shows what limits them. It is not a measurement: within 30 % at best, and
blind to everything that it does not name. Every constant is in this file.
"""

import heapq
import math
from collections.abc import Sequence
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
# From a step's last int8 WGMMA to the next step's first: Triton leaves none in flight that has an int32
# accumulator, so the tensor cores wait for a wait, a barrier and the issue. Another block on the same
# processor fills that; a block alone does not. An estimate: the time of one WGMMA of 256 columns.
DRAIN_CYCLES = 128
# What the last program of a tile waits for: its own part to be written, its count, all the parts.
SUM_LATENCIES = 3
# Of two parts: the count that tells first from last, then the other's part and its count, and the part.
PAIR_LATENCIES = 4
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
# What a day's measurement may be compared with: one more, which gpu.md does not list.
SHEETS = (Gpu("H200", "sm_90", 132, 1.70, 8192, 4096, 4.80e12, 7.5e12), *GPUS)


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


@dataclass(frozen=True)
class _Tiles:
    """Of a product, those of one height.

    Attributes:
        rows: of a tile.
        instructions: of a warp, in a step of the int8 loop.
        waits: loads that wait for one another at the end of a tile.
    """

    programs: int
    rows: int
    instructions: int
    waits: int = 0


def product(gpu: Gpu, config: Any, seen: Any, M: int, N: int, K: int, outliers: int) -> Time:
    """``gemm.py`` with one row of its table; K in parts, they are written, and read by whoever comes
    last to a tile. Plain tiles start when extended ones have, each on the first processor that is free.

    Args:
        config: a ``GemmConfig``.
        seen: its ``sass.Inspection``.
    """
    c = config
    kinds = tile_kinds(gpu, c, seen, M, N, outliers)
    step_k = c.block_k * c.unroll
    steps = math.ceil(math.ceil(K / step_k) / c.parts)
    slowest, cycles = [], []
    drained = DRAIN_CYCLES if _drains(gpu, c, seen, sum(kind.programs for kind in kinds)) else 0
    for kind in kinds:
        step = {
            "tensor cores": 2 * kind.rows * c.block_n * step_k / (gpu.int8 * TENSOR_SHARE) + drained,
            "operand traffic": (kind.rows + c.block_n) * step_k / gpu.port,
            "issue": kind.instructions * c.num_warps / (gpu.issue * ISSUE_SHARE),
        }
        slowest.append(max(step, key=lambda name: step[name]))
        tail = 2 * kind.rows * c.block_n * outliers / (gpu.fp16 * TENSOR_SHARE)
        tail += kind.waits * L2_LATENCY
        cycles.append(steps * step[slowest[-1]] + tail + TILE_CYCLES)
    blocks = seen.blocks_per_multiprocessor
    programs = [kind.programs * c.parts for kind in kinds]
    nbytes = (M + N) * K + 2 * M * N + 2 * outliers * (M + N)
    operands = sum(kind.programs * (kind.rows + c.block_n) for kind in kinds) * K
    # Written and read; who comes last does not read its own, and of two does not write it either.
    crossing = {1: 0, 2: 2}.get(c.parts, 2 * c.parts - 1)
    sums = 4 * crossing * kinds[-1].programs * c.block_m * c.block_n
    limits = {
        slowest[0]: busiest(gpu, blocks, programs, cycles) / (gpu.clock * 1e9),
        "memory": nbytes / (gpu.dram * DRAM_SHARE),
        "L2": (operands + sums) / gpu.l2,
    }
    limit = max(limits, key=lambda name: limits[name])
    waves = math.ceil(sum(programs) / (gpu.processors * blocks))
    waits = waves * {1: 0, 2: PAIR_LATENCIES}.get(c.parts, SUM_LATENCIES)
    return Time(gpu.gap + limits[limit] + waits * L2_LATENCY / (gpu.clock * 1e9), limit)


def _drains(gpu: Gpu, config: Any, seen: Any, tiles: int) -> bool:
    """Whether a product's blocks are alone on their processors, and multiply by WGMMA."""
    is_alone = seen.blocks_per_multiprocessor == 1 or tiles * config.parts <= gpu.processors
    return is_alone and any("IGMMA" in loop for loop in seen.loops)


def tile_kinds(gpu: Gpu, config: Any, seen: Any, M: int, N: int, outliers: int) -> list[_Tiles]:
    """The extended tiles of a product, if there are such, and the plain ones, as programs take them."""
    from int8fx.kernels.gpu.configs import product_tiles

    c = config
    tiles_n = math.ceil(N / c.block_n)
    extended, plain = product_tiles(M, tiles_n, gpu.processors, c.block_m, c.extra_m)
    if not c.extra_m:
        return [_Tiles(plain, c.block_m, _loop_instructions(seen))]
    of_plain, of_extended = (sum(loop.values()) for loop in _int8_loops(seen))
    # Of the loop over outliers, which loads nothing ahead, the first loads are among TILE_CYCLES.
    waits = max(0, _outlier_steps(outliers) - 1)
    kinds = [
        _Tiles(extended, c.block_m + c.extra_m, of_extended, waits),
        _Tiles(plain, c.block_m, of_plain),
    ]
    return [kind for kind in kinds if kind.programs]


def busiest(gpu: Gpu, blocks: int, programs: Sequence[int], cycles: Sequence[float]) -> float:
    """Cycles of the processor that ends last.

    Args:
        blocks: that a processor runs at once.
        programs: how many there are of each kind, in the order in which they are dealt out.
        cycles: that one of each kind takes alone.
    """
    if len(programs) == 1:
        waves = math.ceil(programs[0] / (gpu.processors * blocks))
        return waves * min(blocks, math.ceil(programs[0] / gpu.processors)) * cycles[0]
    if blocks != 1:
        raise ValueError("tiles of two heights are modelled one at a time on a processor")
    ends = [0.0] * gpu.processors
    for count, each in zip(programs, cycles, strict=True):
        for _ in range(count):
            heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def _int8_loops(seen: Any) -> list[dict[str, int]]:
    """The int8 loops, plain ones first; none on AMD, whose code is not split into loops."""
    return [loop for loop in seen.loops if any("IMMA" in n or "IGMMA" in n for n in loop)]


def _loop_instructions(seen: Any) -> int:
    """Of the int8 loop; AMD's issue is not modelled."""
    loops = _int8_loops(seen)
    return sum(loops[-1].values()) if loops else 0


def quantize_gather(
    gpu: Gpu,
    gathers: Any,
    quantizes: Any,
    shape: dict[str, int],
    M: int,
    widths: Sequence[int],
    K: int,
    outliers: int,
) -> Time:
    """``gather.py``; every row has an outlier in each of its columns.

    Quantising, x is read once and int8 written. Else x comes in sectors, one for each outlier. Outliers
    are written, and weights gathered. The launch takes as long as its busiest processor, the programs
    dealt out in order: what they issue, or memory, and what loads that wait for one another take.

    Args:
        gathers: the ``sass.Inspection`` of the kernel that gathers alone.
        quantizes: that of the kernel that quantises as well; or None, it does not.
        shape: its ``launch_shape``.
        widths: N of each weight.
    """
    rows = (3 * M * K + 4 * M) if quantizes else M * min(SECTOR * outliers, 2 * K)
    nbytes = rows + 4 * outliers * M + sum(widths) * outliers * (SECTOR + 2)
    memory = nbytes / (gpu.dram * DRAM_SHARE)
    of_w, of_x, of_rows = gather_instructions(gathers, quantizes, shape, K, outliers)
    # The candidate rows and their elements, for each part of the list; the list and what it lists, for
    # each block of outliers. Who quantises waits for the first two, those of each chunk beside the
    # second of the one before, and for the rows of each later step.
    waits = 2 * _listing_steps(shape, K) + 2 * _outlier_steps(outliers)
    programs = [(of_w, waits)] * sum(math.ceil(N / shape["GATHER_ROWS"]) for N in widths)
    programs += [(of_x, waits)] * math.ceil(M / shape["GATHER_ROWS"])
    if quantizes:
        steps = shape["STEPS"]
        waits_of_rows = 1 + shape["CHUNKS"] + steps - 1
        programs += [(of_rows, waits_of_rows)] * math.ceil(M / (shape["ROWS"] * steps))
    blocks = (quantizes or gathers).blocks_per_multiprocessor

    def time(processor: int) -> Time:
        its = programs[processor :: gpu.processors]
        issue = _issue(gpu, sum(issued for issued, _ in its) * shape["num_warps"])
        waits = sum(max(wait for _, wait in its[i : i + blocks]) for i in range(0, len(its), blocks))
        latency = waits * L2_LATENCY / (gpu.clock * 1e9)
        limit = _slowest(gpu, {"memory": memory, "issue": issue, "latency": latency}).limit
        return Time(gpu.gap + max(memory, issue) + latency, limit)

    return max((time(each) for each in range(gpu.processors)), key=lambda each: each.seconds)


def gather_instructions(
    gathers: Any, quantizes: Any, shape: dict[str, int], K: int, outliers: int
) -> tuple[int, int, int]:
    """Of a warp that gathers from a weight, from x, and of one that quantises rows; 0 on AMD."""
    if not gathers.loops:
        return 0, 0, 0
    *gathering, listing = [loop for loop in gathers.loops if _size(loop) > 1]
    (of_w,) = [loop for loop in gathering if any(name.startswith("I2F") for name in loop)]
    (of_x,) = [loop for loop in gathering if loop is not of_w]
    once = instructions(gathers) - _size(of_w) - _size(of_x) - _size(listing)
    listed = once + _listing_steps(shape, K) * _size(listing)
    steps = _outlier_steps(outliers)
    rows = 0
    if quantizes:
        if not shape["CHUNKS"]:
            raise ValueError(f"rows of {K} elements are quantised in loops, which are not counted")
        # What quantising adds to the kernel; to be sure, what is before it and after it once more.
        rows = once + instructions(quantizes) - instructions(gathers)
        if shape["STEPS"] > 1:
            (step,) = [loop for loop in quantizes.loops if any(n.startswith("HMNMX2") for n in loop)]
            rows += (shape["STEPS"] - 1) * _size(step)
    return listed + steps * _size(of_w), listed + steps * _size(of_x), rows


def _listing_steps(shape: dict[str, int], K: int) -> int:
    from int8fx.kernels.gpu.columns import NEIGHBOURS

    return math.ceil(K / (shape["LIST_BLOCK"] * NEIGHBOURS.value))


def _outlier_steps(outliers: int) -> int:
    from int8fx.kernels.gpu.tiles import BLOCK_O

    return math.ceil(outliers / BLOCK_O.value)


def instructions(seen: Any) -> int:
    """All of a kernel, each once."""
    return sum(seen.opcodes.values()) - seen.opcodes.get("NOP", 0)


def _size(loop: dict[str, int]) -> int:
    return sum(loop.values())


def _issue(gpu: Gpu, instructions: float) -> float:
    """Seconds that the busiest processor takes to issue them."""
    return instructions / (gpu.issue * ISSUE_SHARE * gpu.clock * 1e9)


def _slowest(gpu: Gpu, limits: dict[str, float]) -> Time:
    limit = max(limits, key=lambda name: limits[name])
    return Time(gpu.gap + limits[limit], limit)


# What the kernel of a norm moves, bytes an element: through memory, x in and results out, and what it
# stores for outliers alone (candidate rows), a sector for each, which stays in L2. Inductor's reads x
# up to three times; again is from a processor's own cache.
MOVES = {
    "fp16": (4, 0),  # h
    "column": (2, 1),
    "token": (3, 1),  # x_int8
    "none": (3, 0),  # x_int8
    "residues": (6, 0),  # x_int8 and three residues
}


def norm(gpu: Gpu, M: int, K: int, kind: str, instructions: int, warps: int) -> Time:
    """Inductor's norm and what it fuses with it, or ours (``norm.py``).

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
    from int8fx.kernels.gpu.decode import scan_shape
    from int8fx.kernels.gpu.tiles import STEP_O

    shape, step_o = scan_shape(2, num_warps, 32, K // parts), STEP_O.value
    kinds = {
        "FFMA": (math.ceil(K / parts / shape["QUANTIZE_BLOCK"]), 1),  # quantise
        "HMNMX": (math.ceil(K / shape["SCAN_BLOCK"]), 1),  # columns and scales
        "HMMA": (math.ceil(math.ceil(outliers / parts) / step_o), 2),
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
