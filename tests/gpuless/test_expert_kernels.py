"""The kernels of the expert linear alone, inside poisoned memory, over routings and outlier placements.

As ``test_kernels.py``; ``tests/test_gpu.py`` runs these on a GPU as well.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8fx.kernels.gpu import routing
from int8fx.kernels.gpu.columns import outlier_columns_reference
from int8fx.kernels.gpu.experts import (
    expert_candidate_rows,
    expert_gemm_kernel,
    expert_linear_reference,
    quantize_experts_kernel,
)
from int8fx.kernels.gpu.experts_gradient import expert_gradient_kernel
from int8fx.kernels.ops.quantize_reference import quantize_reference, quantize_weight
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.linear_bound import expected_and_bound
from int8fx.testing.gpuless.where import launchable
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like

THRESHOLD = 6.0
# As in test_kernels.py: half a unit in the last place, and fp32 sums in another order.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
THOROUGH = settings(max_examples=30, deadline=None, derandomize=True)


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


@st.composite
def cases(draw: st.DrawFn) -> Case:
    S, E = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    N, K = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    # Some experts alone have rows; E is none, and what is negative counts from the end.
    used = draw(st.lists(st.integers(-E, E), min_size=1, max_size=4))
    experts = torch.tensor(draw(st.lists(st.sampled_from(used), min_size=S, max_size=S)))
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(S, K, generator=generator)
    hot = torch.rand(K, generator=generator) < share
    x[torch.randint(S, (K,), generator=generator), torch.arange(K)] += 20.0 * hot
    return case(x.to(dtype), torch.randn(E, N, K, generator=generator), experts, draw(st.booleans()))


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


@THOROUGH
@given(cases(), st.sampled_from([THRESHOLD, math.inf]))
def test_rows_are_quantised_by_expert_and_the_columns_listed(given, threshold):
    done = quantize(given, threshold, "column")
    start = 0
    for expert, end in enumerate(done.ends.tolist()):
        mine, start = slice(start, end), end
        if mine.start == end:
            continue
        x_int8, x_scale, _, columns = quantize_reference(done.rows[mine], threshold, "column")
        assert torch.equal(done.x_int8[mine], x_int8)
        assert torch.equal(done.x_scale[mine], x_scale)
        count = int(done.count[expert])
        assert torch.equal(done.columns[expert, :count].long(), columns.nonzero().squeeze(1))


@THOROUGH
@given(
    cases(),
    st.sampled_from([0.0, THRESHOLD, math.inf]),
    st.sampled_from(["column", "token"]),
    st.sampled_from([(16, 1), (32, 2)]),
)
def test_each_row_meets_its_experts_matrix(given, threshold, decomposition, blocks):
    done = quantize(given, threshold, decomposition if threshold else "token")
    y = product(given, done, threshold != 0, *blocks)
    expected = expert_linear_reference(
        done.rows, threshold, decomposition, given.w_int8, given.w_scale, done.ends
    )
    if done.order is not None:
        expected = torch.zeros_like(expected).index_copy_(0, done.order, expected)
    assert not y.isnan().any()
    E = len(given.weight)
    none = given.experts == E
    assert not y[none].any()
    if not none.all():
        assert relative_error(y, expected) < 2 * TOLERANCE[y.dtype]
    for expert in range(E):
        mine = (given.experts == expert) | (given.experts == expert - E)
        exact, bound = expected_and_bound(
            given.x[mine], given.weight[expert], None, threshold, decomposition
        )
        assert ((y[mine].double() - exact).abs() <= bound).all()


@THOROUGH
@given(cases(), st.integers(0, 2**16))
def test_the_gradient_is_that_of_the_int8_weights(given, seed):
    S, N, K, E = given.sizes
    dtype = given.x.dtype
    grad = torch.randn(S, N, generator=torch.Generator().manual_seed(seed)).to(dtype)
    order, ends = routing.order_of(given.experts, given.ends, E)
    operands = [poisoned(grad), poisoned(ends), poisoned(ends if order is None else order)]
    grad_x = poisoned_like(torch.empty(S, K, dtype=dtype))
    operands += [given.w_int8, given.w_scale, grad_x]
    launchable(expert_gradient_kernel)[(routing.tiles(S, E, 16) * -(-K // 32),)](
        *operands,
        S,
        N,
        K,
        E,
        BLOCK_M=16,
        BLOCK_N=16,
        BLOCK_K=32,
        BLOCK_E=routing.block_of_experts(E),
        GROUP_M=2,
        ORDERED=order is not None,
        PRECISION="ieee",
    )
    assert_intact(*operands)
    w_hat = (given.w_int8 * given.w_scale.unsqueeze(-1)).to(dtype)
    w_hat = torch.cat([w_hat, torch.zeros_like(w_hat[:1])]).double()
    expert = torch.where(given.experts < 0, given.experts + E, given.experts)
    expected = torch.einsum("sn,snk->sk", grad.double(), w_hat[expert])
    assert not grad_x[expert == E].any()
    torch.testing.assert_close(
        grad_x.double(), expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
    )


def test_an_outlier_of_one_expert_is_none_of_another():
    """Also where a leftover among the other's candidate rows is this row: candidates are checked."""
    x = torch.ones(8, 40)
    x[1, 7] = 30.0
    ends = torch.tensor([4, 8], dtype=torch.int32)
    weight = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    done = quantize(case(x, weight, torch.arange(8) // 4, True), THRESHOLD, "column")
    assert done.count.tolist() == [1, 0]
    assert torch.equal(done.ends, ends)
    assert not done.x_int8[:4, 7].any()
    assert (done.x_int8[4:, 7] == 127).all()


@pytest.mark.parametrize("wrong", [5, -5, 2**40])
@pytest.mark.parametrize("decomposition", ["column", "token"])
def test_the_row_of_an_expert_that_is_not_there_is_zero(wrong, decomposition):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 8, 40, generator=generator), torch.randn(3, 40, generator=generator)
    given = case(x, weight, torch.tensor([1, wrong, -1]), False)
    y = product(given, quantize(given, THRESHOLD, decomposition), True)
    assert y[0].all() and not y[1].any() and y[2].all()


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from([4, 16, 64]),
)
def test_no_routing_has_more_tiles_than_the_grid_has_room_for(rows, none, block_m):
    needed = sum(-(-count // block_m) for count in (*rows, none))
    assert needed <= routing.tiles(sum(rows) + none, len(rows), block_m)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("decomposition", ["column", "token"])
def test_infinities_and_nan_stay_with_their_rows(value, decomposition):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(4, 40, generator=generator), torch.randn(2, 7, 40, generator=generator)
    x[1, 5] = value
    given = case(x, weight, torch.tensor([0, 1, 1, 0]), False)
    done = quantize(given, THRESHOLD, decomposition)
    y = product(given, done, True)
    expected = expert_linear_reference(
        done.rows, THRESHOLD, decomposition, given.w_int8, given.w_scale, done.ends
    )
    expected = torch.zeros_like(expected).index_copy_(0, done.order, expected)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y[[0, 2, 3]].isfinite().all() and not y[1].isfinite().any()
