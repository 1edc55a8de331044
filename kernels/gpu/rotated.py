"""Rotated int8 linears on a GPU, and the norm before them, as operators that Inductor sees into.

    y_i = rotated_linear(x, 0, block, rotation, weights[i], w_scales[i], w_columns[i], columns[i], ...)

For any number of rows these are two launches of ours: one rotates and quantises x, or its norm
(``rotate.py``), the other multiplies (``rotated_gemm.py``). Nothing is detected, so shapes depend on
shapes alone, and a captured CUDA graph replays for any input.

A row of a result depends on that row of x alone. Its integers are exact, however K is split. The static
columns' product is summed in the order of a matrix instruction, which tiles of 16 rows, for a decode
step, may have another of than larger ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.groups import MAX_GROUP, padded
from int8fx.kernels.gpu.launch import empty, launch, precision, run
from int8fx.kernels.gpu.norm import NORMS, norm_statistics, normalized_reference, serves
from int8fx.kernels.gpu.rotate import columns_room, rotate_kernel, rotate_shape
from int8fx.kernels.gpu.rotated_gemm import rotated_gemm_kernel
from int8fx.kernels.ops.limits import DECODE_ROWS, DTYPES
from int8fx.kernels.ops.rotated_linear import (
    check_rotation,
    rotated_linears_backward,
    rotated_linears_setup,
)
from int8fx.kernels.ops.rotation import NONE, block_of, rotated_columns

_GROUP_M = 8  # tiles of rows that share the weight's tiles in L2
_RANDOM = "random-signs"  # the other rotations have the signs of the regular Hadamard matrix


@triton_op("int8fx::rotated_linears_gpu", mutates_args=())
def rotated_linears_gpu(
    x: Tensor,
    threshold: float,
    block: int,
    rotation: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    w_columns: Sequence[Tensor],
    columns: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """One to three rotated linears of one activation, on a GPU.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        threshold: 0.
        block, rotation: see ``kernels/ops/rotation.py``.
        weights: each ``[N_i, rotated_columns(K)]`` int8, contiguous.
        w_scales: each ``[N_i]`` fp32.
        w_columns: each ``[C, N_i]``, all of one dtype.
        columns: each ``[C]`` int32, ascending; of any two linears the same ones or not.
        biases: each ``[N_i]``, all of one dtype; or empty, no linear has one.

    Returns:
        each ``[*, N_i]``, of x's dtype.

    Raises:
        TypeError: x is of another dtype.
        ValueError: no such rotation or block; more linears than a group takes, or only some with a
            bias; a weight of another dtype, width or device; columns of several numbers.
    """
    linears = RotatedLinears(weights, w_scales, w_columns, columns, biases)
    rotation_ = Rotation.of(x.shape[-1], threshold, block, rotation)
    linears.check(x, rotation_)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    quantized, _ = rotated_rows(rows, rotation_, columns)
    return _shaped(x, _product(quantized, linears))


@triton_op("int8fx::normed_rotated_linears_gpu", mutates_args=())
def normed_rotated_linears_gpu(
    x: Tensor,
    addend: Tensor | None,
    norm: str,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    threshold: float,
    block: int,
    rotation: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    w_columns: Sequence[Tensor],
    columns: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """One to three rotated linears of one norm, on a GPU; no gradients.

    Args:
        x, addend, norm, norm_weight, norm_bias, eps: as ``normed_linears_gpu`` takes them.
        threshold and the others: as ``rotated_linears_gpu`` takes them.

    Returns:
        each ``[*, N_i]``, of h's dtype; with an addend ``x + addend`` after them.

    Raises:
        ValueError: a norm of another name; and what ``rotated_linears_gpu`` raises.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r}; allowed: {', '.join(map(repr, NORMS))}")
    linears = RotatedLinears(weights, w_scales, w_columns, columns, biases)
    rotation_ = Rotation.of(x.shape[-1], threshold, block, rotation)
    linears.check(x, rotation_)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    addends = None if addend is None else addend.reshape(rows.shape).contiguous()
    before = Norm(norm, norm_weight, norm_bias, eps)
    if serves(rows):
        quantized, total = rotated_rows(rows, rotation_, columns, addends, before)
    else:
        total = rows if addends is None else rows + addends
        quantized, _ = rotated_rows(before.reference(total), rotation_, columns)
    outputs = _product(quantized, linears)
    return _shaped(x, outputs if addend is None else [*outputs, total])


def _shaped(x: Tensor, results: Sequence[Tensor]) -> list[Tensor]:
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


@dataclass(frozen=True)
class Norm:
    """What a norm is made of; see ``norm.py``."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float

    def dtype_of(self, x: Tensor) -> torch.dtype:
        """Of the norm of x."""
        return self.weight.dtype if self.kind == "rms, rounded" else x.dtype

    def reference(self, x: Tensor) -> Tensor:
        statistics = norm_statistics(x, self.kind, self.eps)
        return normalized_reference(x, *statistics, self.weight, self.bias, self.kind)


@dataclass(frozen=True)
class Rotation:
    """Of rows of K elements: the size of a block, the length of a rotated row, and its signs."""

    size: int
    length: int
    random: bool

    @classmethod
    def of(cls, K: int, threshold: float, block: int, rotation: str) -> "Rotation":
        check_rotation(threshold, block, rotation)
        if rotation == NONE:
            raise ValueError(f"rotation is {NONE!r}, of which there is no product on a GPU")
        length = rotated_columns(K, block, rotation)
        return cls(block_of(K, block, rotation), length, rotation == _RANDOM)


def sets_of(columns: Sequence[Tensor]) -> int:
    """How many quantisations of x linears may read that keep such columns."""
    return len(columns) if columns[0].shape[0] else 1


@dataclass(frozen=True)
class RotatedLinears:
    """The operands of a group."""

    weights: Sequence[Tensor]
    w_scales: Sequence[Tensor]
    w_columns: Sequence[Tensor]
    columns: Sequence[Tensor]
    biases: Sequence[Tensor]

    @property
    def count(self) -> int:
        """How many columns each of them keeps."""
        return self.columns[0].shape[0]

    @property
    def N(self) -> tuple[int, int, int]:
        return padded([weight.shape[0] for weight in self.weights], absent=0)

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        # Scales stand in for what there is none of, and what no kernel reads then.
        w_columns = self.w_columns if self.count else self.w_scales
        each = self.weights, self.w_scales, w_columns, self.biases or self.w_scales
        return tuple(pointer for tensors in each for pointer in padded(tensors))

    @property
    def flags(self) -> dict[str, bool | int]:
        room = columns_room(self.count)
        return {
            "GROUPED": len(self.weights) > 1,
            "SETS": sets_of(self.columns) > 1,
            "HAS_BIAS": bool(self.biases),
            "COLUMNS": self.count,
            "ROOM": room,
        }

    def tiles(self, block_n: int) -> int:
        return sum(-(-weight.shape[0] // block_n) for weight in self.weights)

    def check(self, x: Tensor, rotation: Rotation) -> None:
        """Raises what ``rotated_linears_gpu`` does."""
        number = len(self.weights)
        others = self.w_scales, self.w_columns, self.columns, self.biases or self.weights
        if not 1 <= number <= MAX_GROUP or any(len(each) != number for each in others):
            raise ValueError(
                f"1 to {MAX_GROUP} linears, each with w_scale, w_columns and columns, and all with a "
                f"bias or none; given {number}, {', '.join(str(len(each)) for each in others[:3])} and "
                f"{len(self.biases)}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
        for weight, stored, at in zip(self.weights, self.w_columns, self.columns, strict=True):
            if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != rotation.length:
                raise ValueError(
                    f"a weight is {weight.dtype} {list(weight.shape)}; with x {list(x.shape)} it has "
                    f"to be int8 [N, {rotation.length}]"
                )
            if weight.device != x.device:
                raise ValueError(f"x is on {x.device}, and a weight on {weight.device}")
            if at.shape != (self.count,) or stored.shape != (self.count, weight.shape[0]):
                raise ValueError(
                    f"columns {list(at.shape)} and w_columns {list(stored.shape)} of a weight of "
                    f"{weight.shape[0]} rows; the first linear keeps {self.count} columns"
                )


@dataclass(frozen=True)
class Quantized:
    """Rows as the product reads them; see ``rotated_gemm.py``.

    Attributes:
        dtype: of what was quantised.
    """

    x_int8: Tensor
    x_scale: Tensor
    x_columns: Tensor
    sets: Tensor
    counters: Tensor
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.x_int8.shape[1]


def rotated_rows(
    x: Tensor,
    rotation: Rotation,
    columns: Sequence[Tensor],
    addend: Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[Quantized, Tensor]:
    """Rows that are rotated and quantised, without the columns that each linear keeps; and what is
    normalised."""
    M, K = x.shape
    count = columns[0].shape[0]
    sets, room = sets_of(columns), columns_room(count)
    total = x if addend is None else torch.empty_like(x)
    dtype = x.dtype if norm is None else norm.dtype_of(x)
    quantized = Quantized(
        empty(x, (sets, M, rotation.length), torch.int8),
        empty(x, (sets, M), torch.float32),
        empty(x, (sets, M, room) if count else (1,), dtype),
        empty(x, (MAX_GROUP,), torch.int32),
        empty(x, (configs.COUNTERS,), torch.int32),
        dtype,
    )
    run(
        rotate_kernel,
        (M, sets),
        x,
        addend,
        None if addend is None else total,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        *padded(columns if count else [x]),  # not read then
        quantized.x_int8,
        quantized.x_scale,
        quantized.x_columns,
        quantized.sets,
        quantized.counters,
        M,
        K,
        0.0 if norm is None else norm.eps,
        NORM="" if norm is None else norm.kind,
        ADDS=addend is not None,
        COLUMNS=count,
        ROOM=room,
        SETS=sets,
        SIZE=rotation.size,
        RANDOM=rotation.random,
        EXACT=dtype == torch.float32,
        COUNTERS=configs.COUNTERS,
        **rotate_shape(K, rotation.size, x.dtype.itemsize),
    )
    return quantized, total


# --- the product ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductConfig:
    """Block sizes of ``rotated_gemm.py``: a row of the tables of ``configs.py``."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    unroll: int = 1
    parts: int = 1

    def constants(self, K: int) -> dict[str, int | bool]:
        """The kernel's constants, for rows of K elements."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "UNROLL": self.unroll,
            "SPLIT_K": self.parts,
            "EVEN_K": K % (self.block_k * self.unroll) == 0,
        }


_LARGE = 128 * 128  # of a tile: there the parts of a sum beside it would spill, if there were three


def of_product(config: configs.GemmConfig) -> ProductConfig:
    c = config
    sizes = c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages
    large = c.block_m * c.block_n >= _LARGE
    return ProductConfig(*sizes, c.unroll, min(c.parts or 1, 2 if large else configs.COUNTERS))


def of_decode(config: configs.DecodeConfig, parts: int = 1) -> ProductConfig:
    c = config
    return ProductConfig(DECODE_ROWS, c.block_n, c.block_k, c.num_warps, c.num_stages, parts=parts)


def _has_registers(config: configs.GemmConfig) -> bool:
    """For the integers of another part, and the columns' product after them."""
    return config.block_n <= 128 or config.parts == 1


def product_configs(
    arch: str, M: int, N: int, K: int, dtype: torch.dtype, processors: int
) -> list[ProductConfig]:
    """The rows worth trying for a shape, the best guess last; none has extended tiles."""
    if M > DECODE_ROWS:
        rows = configs.gemm_configs(arch, M, N, K, dtype, processors)
        return [of_product(row) for row in rows if not row.extra_m and _has_registers(row)]
    kind = f"rows {DECODE_ROWS}"
    chosen = []
    for row in configs.decode_configs(arch, kind, N, K, processors):
        parts = configs.split_k(kind, row, N, K, processors) if configs.counts_parts(arch) else 1
        fits = parts * -(-N // row.block_n) <= configs.COUNTERS
        chosen.append(of_decode(row, parts if fits else 1))
    return chosen


def _product(quantized: Quantized, linears: RotatedLinears) -> list[Tensor]:
    """``[M, N_i]`` of each linear."""
    x_int8, M, K = quantized.x_int8, quantized.rows, quantized.x_int8.shape[2]
    arch, processors = configs.architecture(x_int8.device), configs.multiprocessors(x_int8.device)
    candidates = product_configs(arch, M, sum(linears.N), K, quantized.dtype, processors)
    outputs = [empty(x_int8, (M, weight.shape[0]), quantized.dtype) for weight in linears.weights]
    in_fp32 = quantized.dtype != linears.w_columns[0].dtype

    def grid(meta: dict[str, Any]) -> tuple[Any, ...]:
        return -(-M // meta["BLOCK_M"]) * linears.tiles(meta["BLOCK_N"]), meta["SPLIT_K"]

    launch(
        rotated_gemm_kernel,
        candidates,
        K,
        grid,
        x_int8,
        quantized.x_scale,
        quantized.x_columns,
        quantized.sets,
        _memory_of_parts(x_int8, linears, candidates),
        quantized.counters,
        *linears.pointers,
        *_three(outputs),
        M,
        *linears.N,
        K,
        GROUP_M=_GROUP_M,
        PRECISION=precision(torch.float32 if in_fp32 else quantized.dtype, arch),
        **linears.flags,
    )
    return outputs


def _three(outputs: list[Tensor]) -> tuple[Tensor, ...]:
    # Not one tensor twice: functionalisation would take the two for different results of the kernel.
    return (*outputs, *(outputs[0].new_empty(1) for _ in range(MAX_GROUP - len(outputs))))


def _memory_of_parts(
    x_int8: Tensor, linears: RotatedLinears, candidates: Sequence[ProductConfig]
) -> Tensor:
    """What the programs that share a tile write to, enough for any of the candidates."""
    M = x_int8.shape[1]
    sizes = [
        each.parts * -(-M // each.block_m) * each.block_m * linears.tiles(each.block_n) * each.block_n
        for each in candidates
        if each.parts > 1
    ]
    return empty(x_int8, (max(sizes, default=1),), torch.int32)


rotated_linears_gpu.register_autograd(rotated_linears_backward, setup_context=rotated_linears_setup)
