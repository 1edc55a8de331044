"""The kernels of the expert linear, launched as ``kernel_runs.py`` launches others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.kernels.gpu import routing
from int8fx.kernels.gpu.columns import outlier_columns_reference
from int8fx.kernels.gpu.experts import (
    expert_candidate_rows,
    expert_gemm_kernel,
    quantize_experts_kernel,
)
from int8fx.kernels.ops.quantize_reference import quantize_reference, quantize_weight
from int8fx.testing.gpuless.where import launchable
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like


@dataclass
class Case:
    """Rows, the matrices of some experts, and who meets whom; ``ends`` where rows come sorted."""

    x: Tensor
    weight: Tensor
    w_int8: Tensor
    w_scale: Tensor
    experts: Tensor
    ends: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        E, N, K = self.w_int8.shape
        return self.x.shape[0], N, K, E


def case(x: Tensor, weight: Tensor, experts: Tensor, is_sorted: bool) -> Case:
    E = len(weight)
    ends = None
    if is_sorted:
        experts = torch.where(experts < 0, experts + E, experts).sort().values
        ends = torch.searchsorted(experts, torch.arange(E), right=True).to(torch.int32)
    w_int8, w_scale = quantize_weight(weight)
    return Case(poisoned(x), weight, poisoned(w_int8), poisoned(w_scale), experts, ends)


def candidates_as_found(x: Tensor, ends: Tensor, threshold: float) -> Tensor:
    """Candidate rows where there have to be some, and leftovers of any kind elsewhere."""
    (S, K), E = x.shape, len(ends)
    leftovers = torch.tensor([-1, 0, 1, S - 1, S, 2**15 - 1], dtype=torch.int16)
    candidates = leftovers.repeat((E + 1) * K)[: (E + 1) * K].view(E + 1, K).clone()
    right = expert_candidate_rows(x, threshold, ends).to(torch.int16)
    for expert, (first, last) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        columns = outlier_columns_reference(x[first:last], threshold)
        candidates[expert, columns] = right[expert, columns]
    return poisoned(candidates)


@dataclass
class Quantized:
    """The rows by expert, and what the first kernel made of them."""

    rows: Tensor
    order: Tensor | None
    ends: Tensor
    source: Tensor
    x_int8: Tensor
    x_scale: Tensor
    columns: Tensor
    count: Tensor


def quantize(given: Case, threshold: float, decomposition: str) -> Quantized:
    S, _, K, E = given.sizes
    order, ends = routing.order_of(given.experts, given.ends, E)
    rows = given.x if order is None else given.x[order]
    rows, ends = poisoned(rows), poisoned(ends)
    x_int8, x_scale, x_outlier, _ = quantize_reference(rows, threshold, decomposition)
    quantizes = decomposition == "column"
    fresh = poisoned_like if quantizes else poisoned
    done = Quantized(
        rows,
        None if order is None else poisoned(order),
        ends,
        rows if quantizes else poisoned(x_outlier),
        fresh(x_int8),
        fresh(x_scale),
        poisoned_like(torch.empty(E, K, dtype=torch.int32)),
        poisoned_like(torch.empty(E, dtype=torch.int32)),
    )
    if threshold == 0:
        return done
    operands = [
        candidates_as_found(rows, ends, threshold),
        ends,
        done.x_int8,
        done.x_scale,
        done.columns,
        done.count,
    ]
    launchable(quantize_experts_kernel)[(E + quantizes * routing.tiles(S, E, 4),)](
        done.source,
        *operands,
        S,
        K,
        E,
        threshold,
        QUANTIZE=quantizes,
        ROWS=4,
        CHUNK=32,
        CHUNKS=1 if K <= 32 else 0,
        EVEN_K=K % 32 == 0,
        LIST_BLOCK=4,
        BLOCK_E=routing.block_of_experts(E),
    )
    assert_intact(done.source, *operands)
    return done


def product(
    given: Case, done: Quantized, has_outliers: bool, block_m: int = 16, unroll: int = 1
) -> Tensor:
    S, N, K, E = given.sizes
    y = poisoned_like(torch.empty(S, N, dtype=given.x.dtype))
    launchable(expert_gemm_kernel)[(routing.tiles(S, E, block_m) * -(-N // 32),)](
        done.x_int8,
        done.x_scale,
        done.source,
        done.columns,
        done.count,
        done.ends,
        done.ends if done.order is None else done.order,
        given.w_int8,
        given.w_scale,
        y,
        S,
        N,
        K,
        E,
        BLOCK_M=block_m,
        BLOCK_N=32,
        BLOCK_K=32,
        BLOCK_E=routing.block_of_experts(E),
        GROUP_M=2,
        UNROLL=unroll,
        EVEN_K=K % (32 * unroll) == 0,
        HAS_OUTLIERS=has_outliers,
        ORDERED=done.order is not None,
        PRECISION="ieee",
    )
    tensors = [tensor for tensor in vars(done).values() if tensor is not None]
    assert_intact(y, given.w_int8, given.w_scale, *tensors)
    return y
