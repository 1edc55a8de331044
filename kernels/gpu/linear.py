"""Quantisation and the linears that read it, as one operator that Inductor sees into.

    y_i = int8_linear(quantize(x, threshold, decomposition), weights[i], w_scales[i], biases[i])

It is a ``triton_op``: under torch.compile its body becomes part of the graph. Its aten part is fused
with whatever computes ``x`` and what reads ``y``, and the launches of our kernels are lines of
Inductor's wrapper. Everything after ``x``, in launches:

| M | decomposition | fused with x's own kernel | ours |
|---|---|---|---|
| 1 | any | quantise | decode |
| 2-16 | column | | decode, which quantises |
| 2-16 | token, none | quantise | decode |
| 17 up | column | candidate rows | quantise and gather, product |
| 17 up | token | quantise, candidate rows | gather, product |
| 17 up | none (threshold 0) | quantise | product |

Shapes depend on shapes alone, and the number of outliers stays on the device, so a captured CUDA graph
replays for any input. ``normed.py`` is the same with a norm before it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from int8fx.kernels.gpu import configs, decode, tile_tables
from int8fx.kernels.gpu.columns import candidate_rows
from int8fx.kernels.gpu.gather import (
    launch_shape,
    programs,
    quantize_gather_kernel,
    w_capacity,
    x_capacity,
)
from int8fx.kernels.gpu.gemm import gemm_kernel
from int8fx.kernels.gpu.groups import MAX_GROUP, padded
from int8fx.kernels.gpu.launch import empty, launch, precision, run
from int8fx.kernels.gpu.packing import packed_shape, padded_rows
from int8fx.kernels.gpu.residues import RESIDUES, outlier_residues
from int8fx.kernels.gpu.rounding import int8_rows, quantize_rows
from int8fx.kernels.ops.gradients import linears_backward, linears_setup
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.ops.quantize_reference import EVERYTHING

_GROUP_M = 8  # tiles of rows that share the weight's tiles in L2


@triton_op("int8fx::int8_linears_gpu", mutates_args=())
def int8_linears_gpu(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    sums: bool = True,
) -> list[Tensor]:
    """One to three int8 linears of one activation, on a GPU.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        threshold: an element is an outlier when ``|x| >= threshold``; 0 means no decomposition.
        decomposition: ``"column"``, ``"token"``, or ``"all"``, in which everything is an outlier.
        weights: each ``[N_i, K]`` int8 as ``packing.pack`` leaves it, contiguous.
        w_scales: each ``[N_i]`` fp32.
        biases: each ``[N_i]``, all of one dtype; or empty, no linear has one.
        sums: of partial results are the kernel's to take; False leaves them to what Inductor fuses with
            the result (``decode.py``, split K), as does a GPU on which programs cannot count themselves
            (``configs.counts_parts``). The result is the same.

    Returns:
        each ``[*, N_i]``, of x's dtype.

    Raises:
        TypeError: x is of another dtype.
        ValueError: more linears than a group takes, or only some with a bias; a weight of another
            dtype, width or device.
    """
    check(x, weights, biases)
    rows = padded_rows(x.reshape(-1, x.shape[-1])).contiguous()
    linears = Linears(list(weights), list(w_scales), list(biases))
    if decomposition == "all":
        # As residues of the int8 product, for as many rows as that takes: the weight is read in int8.
        few = rows.shape[0] <= decode.MAX_M
        threshold, decomposition = EVERYTHING, "token" if few else "column"
    outputs = quantized(rows, threshold, decomposition, linears, sums)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if not 1 <= len(weights) <= MAX_GROUP or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"1 to {MAX_GROUP} linears, all with a bias or none; given {len(weights)} weights "
            f"and {len(biases)} biases"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    K = packed_shape(1, x.shape[-1])[1]
    for weight in weights:
        if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != K:
            raise ValueError(
                f"a weight is {weight.dtype} {list(weight.shape)}; "
                f"with x {list(x.shape)} it has to be int8 [N, {K}]"
            )
        if weight.device != x.device:
            raise ValueError(f"x is on {x.device}, and a weight on {weight.device}")


class Linears:
    """The operands of a group, and what its kernels are told about them."""

    def __init__(self, weights: list[Tensor], w_scales: list[Tensor], biases: list[Tensor]) -> None:
        self.weights, self.w_scales, self.biases = weights, w_scales, biases
        self.widths = [weight.shape[0] for weight in weights]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        # Without biases the scales stand in: a kernel with HAS_BIAS = False reads no bias.
        biases = self.biases or self.w_scales
        return (*padded(self.weights), *padded(self.w_scales), *padded(biases))

    @property
    def N(self) -> tuple[int, int, int]:
        return padded(self.widths, absent=0)

    @property
    def flags(self) -> dict[str, bool]:
        return {"GROUPED": len(self.weights) > 1, "HAS_BIAS": bool(self.biases)}

    def outputs(self, x: Tensor, *shape: Any, dtype: torch.dtype) -> list[Tensor]:
        return [empty(x, (*shape, N), dtype) for N in self.widths]

    def tiles(self, block_n: int) -> int:
        return sum(-(-N // block_n) for N in self.widths)


@dataclass(frozen=True)
class Source:
    """An activation of 17 rows and more, as it is gathered from.

    Attributes:
        x: ``[M, K]``; what is no outlier may be zero in it, or, with a norm, what is normalised.
        dtype: of the linears' input.
        quantized: whether ``x_int8`` and ``x_scale`` are filled; else whoever gathers fills them.
        norm: one of ``norm.NORMS``, or empty.
        norm_operands: its statistics, weight and bias.
    """

    x: Tensor
    dtype: torch.dtype
    candidate_rows: Tensor
    x_int8: Tensor
    x_scale: Tensor
    quantized: bool
    norm: str = ""
    norm_operands: tuple[Tensor | None, ...] = (None, None, None)

    @classmethod
    def of(cls, x: Tensor, threshold: float, decomposition: str) -> "Source":
        """Of an activation that Inductor computes."""
        x_int8, x_scale, source, quantized = int8_rows(x, threshold, decomposition)
        if threshold == 0:
            return cls(x, x.dtype, x_scale, x_int8, x_scale, quantized)  # no candidate row is read
        return cls(source, x.dtype, candidate_rows(x, threshold), x_int8, x_scale, quantized)


def _output_pointers(outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Three pointers for one to three outputs.

    Not one tensor twice: functionalisation would take the two for different results of the kernel.
    """
    fill = [outputs[0].new_empty(1) for _ in range(MAX_GROUP - len(outputs))]
    first, second, third = (*outputs, *fill)
    return first, second, third


def quantized(
    x: Tensor, threshold: float, decomposition: str, linears: Linears, sums: bool
) -> list[Tensor]:
    """``[M, N_i]`` of each linear of ``x [M, K]``, which Inductor computes."""
    if x.shape[0] <= decode.MAX_M:
        return _decode(x, threshold, decomposition, linears, sums)
    return product(Source.of(x, threshold, decomposition), threshold, linears)


def _decode(
    x: Tensor, threshold: float, decomposition: str, linears: Linears, sums: bool
) -> list[Tensor]:
    M, K = x.shape
    N, dtype = sum(linears.widths), x.dtype
    arch, processors = configs.architecture(x.device), configs.multiprocessors(x.device)
    rows = _rows_of_decode(x, threshold, decomposition)
    block_m = decode.tile_rows(M, len(rows.residues))
    kind = "quantises" if rows.quantizes else f"rows {block_m}"
    candidates = configs.decode_configs(arch, kind, N, K, processors)
    candidates = tile_tables.decode_tiles(candidates, x.device, kind, N, K, dtype)
    parts = configs.split_k(kind, candidates[-1], N, K, processors)
    flags = linears.flags
    sums = sums and parts > 1 and configs.counts_parts(arch)
    if parts > 1 and not sums:
        outputs = linears.outputs(x, parts, M, dtype=torch.float32)
        flags["HAS_BIAS"] = False  # part of the sum
    else:
        outputs = linears.outputs(x, M, dtype=dtype)
    summing = (rows.x_scale, rows.x_int8)  # not read
    if sums:
        tokens = block_m // (1 + len(rows.residues))
        width = max(linears.tiles(each.block_n) * each.block_n for each in candidates)
        summing = empty(x, (parts, tokens, width), torch.float32), decode.zeros_for_counters(x)
    warps, lanes = candidates[-1].num_warps, configs.warp_size(arch)
    launch(
        decode.decode_kernel,
        candidates,
        K,
        lambda meta: (linears.tiles(meta["BLOCK_N"]), parts),
        *rows.operands,
        *summing,
        *linears.pointers,
        *_output_pointers(outputs),
        M,
        *linears.N,
        K,
        threshold,
        BLOCK_M=block_m,
        SPLIT_K=parts,
        SUMS=sums,
        RESIDUES=len(rows.residues),
        QUANTIZE=rows.quantizes,
        PRECISION=precision(dtype, arch),
        **decode.scan_shape(dtype.itemsize, warps, lanes, -(-K // parts)),
        **flags,
    )
    if parts == 1 or sums:
        return outputs
    biases: list[Any] = linears.biases or [None] * len(outputs)
    return [
        decode.sum_of_parts(output, bias, dtype) for output, bias in zip(outputs, biases, strict=True)
    ]


@dataclass
class _DecodeRows:
    """What the decode kernel reads of an activation, or quantises for itself."""

    x: Tensor
    x_int8: Tensor
    x_scale: Tensor
    residues: list[Tensor]
    residue_scale: Tensor
    work: tuple[Tensor, Tensor]
    quantizes: bool

    @property
    def operands(self) -> tuple[Tensor, ...]:
        residues = self.residues or [self.x_int8] * RESIDUES  # not read
        return (self.x, self.x_int8, self.x_scale, *residues, self.residue_scale, *self.work)


def _rows_of_decode(x: Tensor, threshold: float, decomposition: str) -> _DecodeRows:
    M, K = x.shape
    if threshold != 0 and decomposition == "column" and M > 1:
        x_int8, x_scale = empty(x, (M, K), torch.int8), empty(x, (M,), torch.float32)
        work = empty(x, (K,), torch.int8), empty(x, (K,), torch.int32)
        return _DecodeRows(x, x_int8, x_scale, [], x_scale, work, True)
    x_int8, x_scale, x_outlier = quantize_rows(x, threshold)
    residues, residue_scale = outlier_residues(x_outlier) if threshold != 0 else ([], x_scale)
    # The kernel does not read x: nobody need write it to memory.
    return _DecodeRows(x_int8, x_int8, x_scale, residues, residue_scale, (x_int8, x_int8), False)


def product(source: Source, threshold: float, linears: Linears) -> list[Tensor]:
    """17 rows and more."""
    x = source.x
    M, K = x.shape
    arch, processors = configs.architecture(x.device), configs.multiprocessors(x.device)
    shape = M, sum(linears.widths), K
    candidates = configs.gemm_configs(arch, *shape, source.dtype, processors)
    candidates = tile_tables.product_tiles(candidates, x.device, *shape, source.dtype)
    if threshold == 0:
        # What counts the parts of a tile is made where outliers are gathered.
        candidates = [dataclasses.replace(each, parts=1) for each in candidates]
    *gathered, counters = _gather(source, threshold, linears)
    outputs = linears.outputs(x, M, dtype=source.dtype)
    launch(
        gemm_kernel,
        candidates,
        K,
        lambda meta: (_programs(M, linears, processors, meta), meta["SPLIT_K"]),
        source.x_int8,
        source.x_scale,
        *gathered,
        _memory_of_parts(x, linears, candidates),
        counters,
        *linears.pointers,
        *_output_pointers(outputs),
        M,
        *linears.N,
        K,
        gathered[0].shape[-1],
        gathered[1].shape[-1],
        _extended_tiles(M, linears, processors, candidates),
        GROUP_M=_GROUP_M,
        HAS_OUTLIERS=threshold != 0,
        PRECISION=precision(source.dtype, arch),
        **linears.flags,
    )
    return outputs


def _extended_tiles(
    M: int, linears: Linears, processors: int, candidates: list[configs.GemmConfig]
) -> int:
    """What the candidate with extended tiles is told: how many there are in each column."""
    return next(
        (
            configs.extended_tiles(M, linears.tiles(c.block_n), processors, c.block_m, c.extra_m)
            for c in candidates
            if c.extra_m
        ),
        0,
    )


def _programs(M: int, linears: Linears, processors: int, meta: dict[str, Any]) -> int:
    tiles_n = linears.tiles(meta["BLOCK_N"])
    return sum(configs.product_tiles(M, tiles_n, processors, meta["BLOCK_M"], meta["EXTRA_M"]))


def _tiles(M: int, linears: Linears, block_m: int, block_n: int) -> int:
    return -(-M // block_m) * linears.tiles(block_n)


def _memory_of_parts(x: Tensor, linears: Linears, candidates: list[configs.GemmConfig]) -> Tensor:
    """What the programs that share a tile write to, enough for any of the candidates."""
    sizes = [
        parts * _tiles(x.shape[0], linears, each.block_m, each.block_n) * each.block_m * each.block_n
        for each in candidates
        if (parts := each.parts or 1) > 1
    ]
    return empty(x, (max(sizes, default=1),), torch.float32)


def _gather(source: Source, threshold: float, linears: Linears) -> tuple[Tensor, ...]:
    """What the product reads of outliers: ``x_gathered, w_gathered, columns, count``; and counters."""
    x, dtype = source.x, source.dtype
    M, K = x.shape
    if threshold == 0:
        return x, x, source.x_scale, source.x_scale, source.x_scale  # not read
    capacities = x_capacity(K), w_capacity(K)
    x_gathered = empty(x, (M, capacities[0]), dtype)
    w_gathered = empty(x, (sum(linears.widths), capacities[1]), dtype)
    columns, count = empty(x, (K,), torch.int32), empty(x, (1,), torch.int32)
    counters = empty(x, (configs.COUNTERS,), torch.int32)
    shape = launch_shape(M, K, sum(linears.widths), dtype, source.norm, not source.quantized)
    grid = programs(shape, M, linears.widths, not source.quantized)
    run(
        quantize_gather_kernel,
        (grid,),
        x,
        source.candidate_rows,
        *source.norm_operands,
        *padded(linears.weights),
        source.x_int8,
        source.x_scale,
        x_gathered,
        w_gathered,
        columns,
        count,
        counters,
        M,
        *linears.N,
        K,
        *capacities,
        threshold,
        NORM=source.norm,
        QUANTIZE=not source.quantized,
        **shape,
    )
    return x_gathered, w_gathered, columns, count, counters


# Gradients are straight-through, as in kernels/ops/int8_linear.py.
def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    linears_setup(ctx, inputs[:-1], output)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple:
    gradients = *linears_backward(ctx, grads), None
    # An argument that is at its default is not among the inputs: `sums` may be missing.
    return gradients[: len(ctx.needs_input_grad)]


int8_linears_gpu.register_autograd(_backward, setup_context=_setup)
