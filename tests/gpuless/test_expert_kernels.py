"""The kernels of the expert linear alone, inside poisoned memory, over routings and outlier placements.

As ``test_kernels.py``; ``tests/test_gpu.py`` runs these on a GPU as well.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8fx.kernels.gpu import routing
from int8fx.kernels.gpu.experts import expert_linear_reference
from int8fx.kernels.gpu.experts_gradient import expert_gradient_kernel
from int8fx.kernels.ops.quantize_reference import quantize_reference
from int8fx.testing.gpuless.expert_runs import Case, case, product, quantize
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.kernel_runs import THRESHOLD, TOLERANCE
from int8fx.testing.gpuless.linear_bound import expected_and_bound
from int8fx.testing.gpuless.where import launchable
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like

THOROUGH = settings(max_examples=30, deadline=None, derandomize=True)


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
