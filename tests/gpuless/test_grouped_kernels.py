"""The kernel of weights by groups alone, inside poisoned memory, over groups, zeros and shapes.

Here in the interpreter; ``tests/test_gpu.py`` runs the same on a GPU.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8fx.kernels.formats.grouped import WHOLE, ZEROS
from int8fx.testing.gpuless.grouped_runs import FLOATS, Case, case, check, run
from int8fx.testing.nogpu.guard import poisoned

GROUPS = (16, 32, 48, 64, 96, 128, 192, 256, WHOLE)
THOROUGH = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {
    "parts": st.integers(1, 3),
    "block_m": st.sampled_from([16, 32]),
    "most": st.sampled_from([64, 128]),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    bits = draw(st.sampled_from([4, 4, 8]))
    in_int8 = bits == 4 and draw(st.booleans())
    count = draw(st.sampled_from([0, 1, 8])) if in_int8 else 0
    widths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    return case(
        draw(st.sampled_from([1, 2, 15, 16, 17, 40])),
        draw(st.integers(1, 300)),
        widths,
        draw(st.sampled_from(GROUPS if bits == 4 else GROUPS[:-1])),
        draw(st.sampled_from(ZEROS if bits == 4 else ZEROS[:1])),
        bits,
        draw(st.sampled_from(FLOATS)),
        in_int8,
        count,
        draw(st.booleans()),
        2 if count and len(widths) > 1 else 1,
        draw(st.integers(0, 2**16)),
    )


@THOROUGH
@given(case=cases(), **SHAPES)
def test_a_product_is_within_the_bound(case, **shape):
    check(case, **shape)


@pytest.mark.parametrize("in_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_with_every_kind_of_zero(group, zeros, in_int8):
    """K ends within a group, within a step and within a byte."""
    for K, parts in ((320, 2), (301, 1)):
        check(case(5, K, [40], group, zeros, in_int8=in_int8, seed=K), parts=parts, most=128)


@pytest.mark.parametrize("group", [16, 48, 64])
def test_sums_of_integers_are_exact(group):
    """Scales of 1 and rows in int8: a result in fp32 is the integer, however K is split."""
    given = case(3, 192, [40], group, dtype=torch.float32, in_int8=True)
    given.x_scale.fill_(1.0)
    given.weights[0].scale.fill_(1.0)
    exact = given.x[0].double() @ (given.weights[0].codes.double() - 8).t()
    for parts in (1, 2, 3):
        assert torch.equal(run(given, parts=parts)[0].double(), exact)


@pytest.mark.parametrize("in_int8", [False, True], ids=["float", "int8"])
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it(in_int8):
    given = case(20, 200, [50], 32, "integer", in_int8=in_int8)
    whole = run(given, block_m=32)[0].clone()
    for rows in (slice(7, 8), slice(0, 16)):
        parts = given.x[:, rows], given.x_scale[:, rows], given.x_columns[:, rows]
        x, x_scale, x_columns = map(poisoned, parts)
        some = dataclasses.replace(given, x=x, x_scale=x_scale, x_columns=x_columns)
        assert torch.equal(run(some, block_m=32)[0], whole[rows])
