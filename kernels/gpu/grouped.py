"""Linears of weights by groups on a GPU, as operators that Inductor sees into.

    y_i = grouped_linear(x, group, zeros, block, rotation, weights[i], scales[i], ...)
    y_i = grouped_float_linear(x, group, zeros, weights[i], scales[i], ...)
    y_i = group_linear(x, weights[i], w_scales[i], ...)

For any number of rows this is one launch (``grouped_gemm.py``), and of rows in int8 the one that
rotates and quantises them before it (``rotate.py``). Rows that are not rotated are quantised by
operators of torch's, which Inductor fuses with whatever computes x.

Shapes depend on shapes alone, so a captured CUDA graph replays for any input. A row of a result depends
on that row of x alone.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from int8fx.kernels.formats.grouped import WHOLE, ZEROS
from int8fx.kernels.formats.groups import dequantize_groups
from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.decode import zeros_for_counters
from int8fx.kernels.gpu.grouped_configs import GroupedConfig, group_columns, grouped_configs
from int8fx.kernels.gpu.grouped_gemm import grouped_gemm_kernel
from int8fx.kernels.gpu.grouped_packing import packed_shape
from int8fx.kernels.gpu.groups import MAX_GROUP, padded
from int8fx.kernels.gpu.launch import empty, launch, precision
from int8fx.kernels.gpu.packing import padded_rows
from int8fx.kernels.gpu.rotate import columns_room
from int8fx.kernels.gpu.rotated import Rotation, rotated_rows
from int8fx.kernels.ops import grouped_linear as ops
from int8fx.kernels.ops.gradients import bias_gradient
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.ops.quantize_reference import quantize_reference
from int8fx.kernels.ops.rotated_linear import check_rotation, quantize_rotated_reference
from int8fx.kernels.ops.rotation import NONE

_GROUP_M = 8  # tiles of rows that share the weight's tiles in L2


@triton_op("int8fx::grouped_float_linears_gpu", mutates_args=())
def grouped_float_linears_gpu(
    x: Tensor,
    group: int,
    zeros: str,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """One to three linears of 4-bit weights by groups, of one activation as it is, on a GPU.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        group: a multiple of 16, or ``WHOLE``.
        zeros: a name of ``kernels/formats/grouped.py``.
        weights: each as ``grouped_packing.pack`` leaves it.
        scales: each ``[N_i, G]``, all of one dtype.
        zero_points: each ``[N_i, G]``, all of one dtype; empty with ``zeros="middle"``.
        biases: each ``[N_i]``, all of one dtype; or empty, no linear has one.

    Returns:
        each ``[*, N_i]``, of x's dtype.

    Raises:
        TypeError: x is of another dtype.
        ValueError: more linears than a launch takes, or only some with a bias; a group, zeros or a
            weight that is none of these.
    """
    linears = GroupedLinears(group, zeros, weights, scales, zero_points, [], [], biases)
    linears.check(x, x.shape[-1])
    return _shaped(x, _product(_as_they_are(x), linears))


@triton_op("int8fx::grouped_linears_gpu", mutates_args=())
def grouped_linears_gpu(
    x: Tensor,
    group: int,
    zeros: str,
    block: int,
    rotation: str,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    w_columns: Sequence[Tensor],
    columns: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """The same of x in int8, rotated and without its static columns, which are a product beside it.

    Args:
        block, rotation: see ``kernels/ops/rotation.py``; ``"none"`` as well.
        w_columns: each ``[C, N_i]``, all of one dtype; or empty, there are none.
        columns: each ``[C]`` int32, ascending; of any two linears the same ones or not.
        x and the others: as ``grouped_float_linears_gpu`` takes them.

    Raises:
        ValueError: also for a rotation or a block that there is none of.
    """
    check_rotation(0.0, block, rotation)
    linears = GroupedLinears(group, zeros, weights, scales, zero_points, w_columns, columns, biases)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rotation == NONE:
        linears.check(x, x.shape[-1])
        return _shaped(x, _product(_quantized(rows, linears), linears))
    turned = Rotation.of(x.shape[-1], 0.0, block, rotation)
    linears.check(x, turned.length)
    return _shaped(x, _product(_rotated(rows, turned, linears), linears))


@triton_op("int8fx::group_linears_gpu", mutates_args=())
def group_linears_gpu(
    x: Tensor, weights: Sequence[Tensor], w_scales: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    """One to three linears of int8 weights by groups, of one activation as it is, on a GPU.

    Args:
        weights: each ``[N_i, G · group]`` int8, K padded to a multiple of the group.
        w_scales: each ``[N_i, G]`` fp32.
        x, biases: as ``grouped_float_linears_gpu`` takes them.

    Raises:
        ValueError: what that raises.
    """
    group = weights[0].shape[1] // w_scales[0].shape[1] if weights else WHOLE
    linears = GroupedLinears(group, "middle", weights, w_scales, [], [], [], biases)
    linears.check(x, x.shape[-1])
    return _shaped(x, _product(_as_they_are(x), linears))


def _shaped(x: Tensor, results: Sequence[Tensor]) -> list[Tensor]:
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


@dataclass(frozen=True)
class GroupedLinears:
    """The operands of one launch. Weights of uint8 have 4 bits, and of int8 have 8."""

    group: int
    zeros: str
    weights: Sequence[Tensor]
    scales: Sequence[Tensor]
    zero_points: Sequence[Tensor]
    w_columns: Sequence[Tensor]
    columns: Sequence[Tensor]
    biases: Sequence[Tensor]

    @property
    def widths(self) -> list[int]:
        return [scale.shape[0] for scale in self.scales]

    @property
    def N(self) -> tuple[int, int, int]:
        return padded(self.widths, absent=0)

    @property
    def bits(self) -> int:
        return 4 if self.weights[0].dtype == torch.uint8 else 8

    @property
    def row_bytes(self) -> int:
        return self.weights[0].numel() // self.scales[0].shape[0]

    @property
    def count(self) -> int:
        """How many columns each of them keeps."""
        return self.columns[0].shape[0] if self.columns else 0

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        # Scales stand in for what there is none of, and what no kernel reads then.
        kept = self.w_columns if self.count else self.scales
        each = self.weights, self.scales, self.zero_points or self.scales, kept
        return tuple(p for tensors in (*each, self.biases or self.scales) for p in padded(tensors))

    @property
    def flags(self) -> dict[str, Any]:
        return {
            "GROUP": group_columns(self.group),
            "ZEROS": self.zeros,
            "BITS": self.bits,
            "GROUPED": len(self.weights) > 1,
            "SETS": self.count > 0 and len(self.weights) > 1,
            "HAS_BIAS": bool(self.biases),
            "COLUMNS": self.count,
            "ROOM": columns_room(self.count),
        }

    def tiles(self, block_n: int) -> int:
        return sum(-(-N // block_n) for N in self.widths)

    def check(self, x: Tensor, K: int) -> None:
        """Raises what the operators do, for rows of K columns before they are padded."""
        number = len(self.weights)
        others = self.scales, self.zero_points, self.w_columns, self.columns, self.biases
        fits = all(len(each) in (0, number) for each in others) and len(self.scales) == number
        if not 1 <= number <= MAX_GROUP or not fits:
            counts = ", ".join(str(len(each)) for each in others)
            raise ValueError(
                f"1 to {MAX_GROUP} linears, each with all that one of them has; given {number} weights "
                f"and {counts} scales, zero points, w_columns, columns and biases"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
        if self.zeros not in ZEROS or (self.zeros == "middle") is bool(self.zero_points):
            raise ValueError(
                f"zeros={self.zeros!r} with {len(self.zero_points)} zero points; allowed: 'middle' "
                f"without them, or {', '.join(map(repr, ZEROS[1:]))} with one for each linear"
            )
        if self.group != WHOLE and (self.group < 16 or self.group % 16):
            raise ValueError(f"group={self.group}; allowed: a multiple of 16, or {WHOLE}: all of K")
        self._check_weights(x, K)

    def _check_weights(self, x: Tensor, K: int) -> None:
        G = 1 if self.group == WHOLE else -(-K // self.group)
        columns = K if self.group == WHOLE else G * self.group
        for weight, scale in zip(self.weights, self.scales, strict=True):
            N = scale.shape[0]
            shape = packed_shape(N, -(-columns // 2)) if self.bits == 4 else (N, columns)
            given = weight.dtype, tuple(weight.shape), tuple(scale.shape)
            if given != (self.weights[0].dtype, shape, (N, G)):
                raise ValueError(
                    f"a weight is {weight.dtype} {list(weight.shape)} with scales "
                    f"{list(scale.shape)}; with x {list(x.shape)} and groups of {self.group} it has to "
                    f"be {self.weights[0].dtype} {list(shape)} with scales {[N, G]}"
                )
            if weight.device != x.device:
                raise ValueError(f"x is on {x.device}, and a weight on {weight.device}")
        for each, kept in zip(self.columns, self.w_columns, strict=True):
            if each.shape[0] != self.count or kept.shape[0] != self.count:
                raise ValueError(
                    f"columns {list(each.shape)} with weights {list(kept.shape)}; all linears of a "
                    f"launch keep as many: {self.count}"
                )


# --- rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What the kernel multiplies.

    Attributes:
        source: ``[M, *]``, what the rows are made of, of the results' dtype.
        x: ``[SETS, M, K]``, int8 or a float.
        x_scale, x_columns, sets: where it is int8, as ``rotate.py`` makes them.
        counters: zeros that are there already, as int32; or None.
    """

    source: Tensor
    x: Tensor
    x_scale: Tensor
    x_columns: Tensor
    sets: Tensor
    counters: Tensor | None = None

    @property
    def room(self) -> int:
        """How many tiles may count their parts."""
        return self.source.shape[1] // 4 if self.counters is None else configs.COUNTERS


def _as_they_are(x: Tensor) -> Rows:
    rows = padded_rows(x.reshape(-1, x.shape[-1])).contiguous()
    return Rows(rows, rows.unsqueeze(0), rows, rows, rows)  # of which the kernel reads the first


def _quantized(x: Tensor, linears: GroupedLinears) -> Rows:
    """Rows in int8 that are not rotated, for each linear its own where columns are kept."""
    if not linears.count:
        x_int8, x_scale, *_ = quantize_reference(x, 0.0, "token")
        return Rows(x, padded_rows(x_int8).unsqueeze(0), x_scale, x_scale, x_scale)
    done = [quantize_rotated_reference(x, each, 0.0, 0, NONE) for each in linears.columns]
    missing = columns_room(linears.count) - linears.count
    return Rows(
        x,
        torch.stack([padded_rows(x_int8) for x_int8, *_ in done]),
        torch.stack([x_scale for _, x_scale, *_ in done]),
        torch.stack([F.pad(x_columns, (0, missing)) for *_, x_columns in done]),
        torch.arange(len(done), dtype=torch.int32, device=x.device),
    )


def _rotated(x: Tensor, rotation: Rotation, linears: GroupedLinears) -> Rows:
    nothing = torch.empty(0, dtype=torch.int32, device=x.device)
    done, _ = rotated_rows(x, rotation, linears.columns or [nothing])
    return Rows(x, done.x_int8, done.x_scale, done.x_columns, done.sets, done.counters)


# --- the product ------------------------------------------------------------------------------------


def _product(rows: Rows, linears: GroupedLinears) -> list[Tensor]:
    """``[M, N_i]`` of each linear."""
    x, dtype = rows.x, rows.source.dtype
    _, M, K = x.shape
    arch, processors = configs.architecture(x.device), configs.multiprocessors(x.device)
    how = linears.group, linears.bits, dtype, processors
    candidates = [
        config if linears.tiles(config.block_n) <= rows.room else dataclasses.replace(config, parts=1)
        for config in grouped_configs(arch, M, sum(linears.widths), K, *how)
    ]
    counters = rows.counters
    if counters is None:
        splits = any(config.parts > 1 for config in candidates)
        counters = zeros_for_counters(rows.source) if splits else rows.source
    outputs = [empty(x, (M, N), dtype) for N in linears.widths]
    in_fp32 = linears.count and dtype != linears.w_columns[0].dtype

    def grid(meta: dict[str, Any]) -> tuple[Any, ...]:
        return -(-M // meta["BLOCK_M"]) * linears.tiles(meta["BLOCK_N"]), meta["SPLIT_K"]

    launch(
        grouped_gemm_kernel,
        candidates,
        K,
        grid,
        x,
        rows.x_scale,
        rows.x_columns,
        rows.sets,
        _memory_of_parts(x, linears, candidates),
        counters,
        *linears.pointers,
        *_three(outputs),
        M,
        *linears.N,
        K,
        linears.row_bytes,
        linears.scales[0].shape[1],
        GROUP_M=_GROUP_M,
        PRECISION=precision(torch.float32 if in_fp32 else dtype, arch),
        **linears.flags,
    )
    return outputs


def _three(outputs: list[Tensor]) -> tuple[Tensor, ...]:
    # Not one tensor twice: functionalisation would take the two for different results of the kernel.
    return (*outputs, *(outputs[0].new_empty(1) for _ in range(MAX_GROUP - len(outputs))))


def _memory_of_parts(x: Tensor, linears: GroupedLinears, candidates: Sequence[GroupedConfig]) -> Tensor:
    """What the programs that share a tile write to, enough for any of the candidates."""
    sizes = [
        each.parts * each.block_m * linears.tiles(each.block_n) * each.block_n
        for each in candidates
        if each.parts > 1
    ]
    return empty(x, (max(sizes, default=1),), torch.float32)


grouped_linears_gpu.register_autograd(
    ops.grouped_linears_backward, setup_context=ops.grouped_linears_setup
)
grouped_float_linears_gpu.register_autograd(
    ops.grouped_float_linears_backward, setup_context=ops.grouped_float_linears_setup
)


def _group_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weights, w_scales, biases = inputs
    ctx.save_for_backward(*weights, *w_scales)
    ctx.K, ctx.bias_dtypes = x.shape[-1], [bias.dtype for bias in biases]


def _group_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple:
    saved = ctx.saved_tensors
    pairs = zip(saved[: len(grads)], saved[len(grads) :], strict=True)
    grad_x = sum(
        grad @ dequantize_groups(*pair, ctx.K).to(grad.dtype)
        for grad, pair in zip(grads, pairs, strict=True)
    )
    given = zip(grads, ctx.bias_dtypes, strict=False)
    nothing = [None] * len(grads)
    return grad_x, nothing, nothing, [bias_gradient(grad, dtype) for grad, dtype in given]


group_linears_gpu.register_autograd(_group_backward, setup_context=_group_setup)
