"""The expert linear on a GPU: each row meets the int8 matrix of its own expert, nothing synchronised.

    y[s] = ((x_int8[s] @ w_int8[e]ᵀ) · x_scale[s] + x[s, C_e] @ w_int8[e][:, C_e]ᵀ) · w_scale[e]

with e the expert of row s and C_e the columns that hold an outlier in any row of e. As ``linear.py``'s
it is a ``triton_op``: what is aten here Inductor fuses with whatever computes ``x``. After ``x``:

| decomposition | fused with x's own kernel | ours |
|---|---|---|
| column | candidate rows | quantise and list the columns, product |
| token | quantise, candidate rows | list the columns, product |
| none (threshold 0) | quantise | product |

- **Rows** are sorted by expert, or are sorted here (``routing.py``): x by an index that Inductor fuses
  with what computes it, y by the product's store. The grid has room for any routing; programs that are
  left over leave at once.
- **Outliers** cross from kernel to kernel as a candidate row for each expert and column
  (``columns.py``), counted from the first row of the expert. No weight is gathered in memory, which
  would be a 16-bit copy of all experts: the product reads the listed columns of its own tile, after the
  int8 loop. The list has room for all K columns of every expert, so nothing is dropped.

Source: Dettmers et al. 2022, "LLM.int8()", equation 8; grouped products over sorted rows are those of
Gale et al. 2022, "MegaBlocks", arXiv 2211.15841. Reference: ``expert_linear_reference``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.columns import find_columns
from int8fx.kernels.gpu.decode import add_outlier_columns, quantized_linear_reference
from int8fx.kernels.gpu.experts_gradient import expert_linear_backward
from int8fx.kernels.gpu.gather import launch_shape
from int8fx.kernels.gpu.gemm import int8_product, tile_in_bands
from int8fx.kernels.gpu.launch import empty, launch, precision, run
from int8fx.kernels.gpu.packing import packed_shape, padded_rows
from int8fx.kernels.gpu.rounding import int8_rows
from int8fx.kernels.gpu.routing import (
    block_of_experts,
    experts_of_rows,
    order_of,
    rows_of_expert,
    rows_of_tile,
    tiles,
)
from int8fx.kernels.gpu.tiles import of_columns, wrapped_range
from int8fx.kernels.gpu.without_columns import quantize_without_columns
from int8fx.kernels.ops.expert_linear import check_routing, setup_context, sorted_rows
from int8fx.kernels.ops.limits import DTYPES

_GROUP_M = 8


def expert_linear_reference(
    x: Tensor, threshold: float, decomposition: str, weight: Tensor, w_scale: Tensor, ends: Tensor
) -> Tensor:
    """The formula above in plain PyTorch, for sorted rows; the arguments are ``expert_linear``'s."""
    y = x.new_zeros((x.shape[0], w_scale.shape[1]))
    for expert, rows in sorted_rows(ends):
        y[rows] = quantized_linear_reference(
            x[rows], threshold, decomposition, weight[expert], w_scale[expert], None
        )
    return y


@triton.jit
def quantize_experts_kernel(
    x_ptr,  # [S, K], rows by expert
    candidates_ptr,  # [E + 1, K]
    ends_ptr,  # [E]
    x_int8_ptr,  # [S, K]
    x_scale_ptr,  # [S] fp32
    columns_ptr,  # [E, K] int32
    count_ptr,  # [E] int32
    S, K, E,
    threshold,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN_K: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first E programs list the outlier columns of an expert each, the others quantise rows."""
    # Inductor passes Python floats as fp64, eager Triton as fp32.
    limit = tl.full((), threshold, tl.float32)
    program = tl.program_id(0)
    if program < E:
        first, last = rows_of_expert(ends_ptr, program, S)
        here = program.to(tl.int64) * K
        if first < last:
            count = find_columns(
                candidates_ptr + here, x_ptr + first.to(tl.int64) * K, columns_ptr + here,
                last - first, K, limit, LIST_BLOCK, False, None, "",
            )  # fmt: skip
            tl.store(count_ptr + program, count)
    elif QUANTIZE:
        expert, start, first, last = rows_of_tile(program - E, ends_ptr, S, E, ROWS, BLOCK_E)
        if expert < E:
            here = start.to(tl.int64) * K
            quantize_without_columns(
                x_ptr + here, candidates_ptr + expert.to(tl.int64) * K, x_int8_ptr + here,
                x_scale_ptr + start, first - start, last - start, K, limit,
                ROWS, 1, CHUNK, CHUNKS, EVEN_K, False, None, "",
            )  # fmt: skip


@triton.jit
def _store(y, y_ptr, order_ptr, rows, m, last, columns, N, ORDERED: tl.constexpr):
    """Rows to where they came from. Addresses are computed here: before the product they would have to
    be kept through it."""
    if ORDERED:
        m = tl.load(order_ptr + m)
    target = y_ptr + m.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows < last)[:, None] & (columns < N)[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expert_gemm_kernel(
    x_int8_ptr,  # [S, K], rows by expert
    x_scale_ptr,  # [S] fp32
    x_ptr,  # [S, K], where HAS_OUTLIERS
    columns_ptr,  # [E, K] int32, where HAS_OUTLIERS
    count_ptr,  # [E] int32, where HAS_OUTLIERS
    ends_ptr,  # [E]
    order_ptr,  # [S], where ORDERED
    w_ptr,  # [E, N, K] int8
    w_scale_ptr,  # [E, N] fp32
    y_ptr,  # [S, N]
    S, N, K, E,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_in_bands(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    expert, _, first, last = rows_of_tile(tile_m, ends_ptr, S, E, BLOCK_M, BLOCK_E)
    if expert > E:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one, and are not stored: loads without masks pipeline.
    m = tl.minimum(rows, last - 1)
    n = wrapped_range(tile_n * BLOCK_N, N, BLOCK_N)
    if expert == E:
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        _store(y, y_ptr, order_ptr, rows, m, last, columns, N, ORDERED)
        return
    w_ptr += expert.to(tl.int64) * N * K
    acc_int32 = int8_product(
        x_int8_ptr, w_ptr, m, n, 0, K, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UNROLL
    )
    y = acc_int32.to(tl.float32) * tl.load(x_scale_ptr + m)[:, None]
    if HAS_OUTLIERS:
        x_row = x_ptr + m.to(tl.int64)[:, None] * K
        w_row = w_ptr + n.to(tl.int64)[None, :] * K
        y = add_outlier_columns(
            y, x_row, rows < last, w_row, columns_ptr + expert.to(tl.int64) * K,
            0, tl.load(count_ptr + expert), PRECISION,
        )  # fmt: skip
    y *= of_columns(w_scale_ptr + expert * N, columns, N)[None, :]
    _store(y, y_ptr, order_ptr, rows, m, last, columns, N, ORDERED)


@triton_op("int8fx::expert_linear_gpu", mutates_args=())
def expert_linear(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weight: Tensor,
    w_scale: Tensor,
    experts: Tensor | None,
    ends: Tensor | None = None,
) -> Tensor:
    """``int8fx::expert_linear`` (``kernels/ops/expert_linear.py``) on a GPU.

    Args:
        x: ``[S, K]``, fp32, bf16 or fp16.
        threshold: an element is an outlier when ``|x| >= threshold``; 0 means no decomposition.
        decomposition: ``"column"`` or ``"token"``.
        weight: ``[E, N, K]`` int8, each matrix as ``packing.pack`` leaves it, contiguous.
        w_scale: ``[E, N]`` fp32.
        experts: ``[S]``; or None, where rows come sorted.
        ends: then ``[E]``, where the rows of each expert end.

    Returns:
        ``[S, N]`` of x's dtype. A row without an expert is zero, and so is one whose expert is not
        there: to raise, as on a CPU, the host would have to wait.

    Raises:
        TypeError: x is of another dtype.
        ValueError: a weight of another dtype, width or device, or not contiguous; not one of
            ``experts`` and ``ends``, or not an end for each expert.
    """
    _check(x, weight, experts, ends)
    S, (E, N, K) = x.shape[0], weight.shape
    order, ends = order_of(experts, ends, E)
    rows = padded_rows(x)
    rows = rows.contiguous() if order is None else rows[order]
    x_int8, x_scale, source, columns, count = _quantize(rows, threshold, decomposition, ends)
    y = empty(x, (S, N), x.dtype)
    arch = configs.architecture(x.device)
    launch(
        expert_gemm_kernel,
        configs.expert_configs(arch, S, E, N, x.dtype),
        K,
        lambda meta: (tiles(S, E, meta["BLOCK_M"]) * -(-N // meta["BLOCK_N"]),),
        x_int8,
        x_scale,
        source,
        columns,
        count,
        ends,
        ends if order is None else order,
        weight,
        w_scale,
        y,
        S,
        N,
        K,
        E,
        BLOCK_E=block_of_experts(E),
        GROUP_M=_GROUP_M,
        HAS_OUTLIERS=threshold != 0,
        ORDERED=order is not None,
        PRECISION=precision(x.dtype, arch),
    )
    return y


def _check(x: Tensor, weight: Tensor, experts: Tensor | None, ends: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    K = packed_shape(1, x.shape[-1])[1]
    if weight.dtype != torch.int8 or weight.dim() != 3 or weight.shape[2] != K:
        raise ValueError(
            f"the weight is {weight.dtype} {list(weight.shape)}; "
            f"with x {list(x.shape)} it has to be int8 [E, N, {K}]"
        )
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device}, and the weight on {weight.device}")
    if not weight.is_contiguous():
        raise ValueError(f"the weight's strides are {list(weight.stride())}; it has to be contiguous")
    check_routing(experts, ends, weight.shape[0])


def _quantize(
    x: Tensor, threshold: float, decomposition: str, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the product reads: ``x_int8, x_scale, x, columns, count``."""
    (S, K), E = x.shape, ends.shape[0]
    x_int8, x_scale, source, fused = int8_rows(x, threshold, decomposition)
    if threshold == 0:
        return x_int8, x_scale, x_int8, x_int8, x_int8  # the last three are not read
    columns, count = empty(x, (E, K), torch.int32), empty(x, (E,), torch.int32)
    shape = list_shape(S, K, x.dtype)
    programs = E if fused else E + tiles(S, E, shape["ROWS"])
    run(
        quantize_experts_kernel,
        (programs,),
        source,
        expert_candidate_rows(x, threshold, ends),
        ends,
        x_int8,
        x_scale,
        columns,
        count,
        S,
        K,
        E,
        threshold,
        QUANTIZE=not fused,
        BLOCK_E=block_of_experts(E),
        **shape,
    )
    return x_int8, x_scale, source, columns, count


def list_shape(S: int, K: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Block sizes of the kernel that quantises and lists, for S rows of K elements."""
    shape = launch_shape(S, K, 0, dtype)
    del shape["GATHER_ROWS"], shape["STEPS"]
    return shape


def expert_candidate_rows(x: Tensor, threshold: float, ends: Tensor) -> Tensor:
    """For each expert and column a row with an outlier, if there is one, and else anything at all.

    In operators that Inductor fuses with whatever computes ``x``; ``columns.py`` says why it works.

    Args:
        x: ``[S, K]``, fp32, bf16 or fp16, rows by expert.
        ends: ``[E]``.

    Returns:
        ``[E + 1, K]``, rows counted from the first of the expert, int16 where that can number S rows,
        else int32; the last is not for reading.
    """
    (S, K), E = x.shape, ends.shape[0]
    dtype = torch.int16 if S < 2**15 else torch.int32
    expert, start = experts_of_rows(ends, S)
    is_outlier = x.to(torch.float32).abs() >= threshold
    column = torch.arange(K, device=x.device)
    target = torch.where(is_outlier, expert.unsqueeze(1), E) * K + column
    rows = (torch.arange(S, device=x.device) - start).to(dtype).unsqueeze(1).expand(S, K)
    memory = torch.empty((E + 1) * K, dtype=dtype, device=x.device)
    return torch.index_put(memory, (target,), rows).view(E + 1, K)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grad_x = expert_linear_backward(grad, *ctx.saved_tensors)[:, : ctx.K]
    return (grad_x, *[None] * (ctx.inputs - 1))


expert_linear.register_autograd(_backward, setup_context=setup_context)
