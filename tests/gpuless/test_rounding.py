"""Quantising without a division, for every pair of an element and its row's absmax."""

import pytest
import torch
import triton
import triton.language as tl

from int8fx.kernels.gpu.rounding import quantize, quantize_rows
from int8fx.kernels.ops.quantize_reference import MIN_SCALE, quantize_reference
from int8fx.testing.nogpu.interpreter import interpret

# Of half a step: the reciprocal and the product, each rounded to 2⁻²⁴ of at most 127 steps.
ROUND_OFF = 127 * 2.0**-23


@triton.jit
def quantize_kernel(x_ptr, scale_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    scale = tl.load(scale_ptr + tl.arange(0, ROWS))
    tl.store(y_ptr + tile, quantize(tl.load(x_ptr + tile), scale[:, None], True))


# Of fp16 elements x and absmax only the significands matter, 1024 to 2047 (bf16's are among them), and
# how many powers of two lie between: beyond eight, |x| / scale < 1/2 for all of them.
SIGNIFICANDS = torch.arange(1024.0, 2048.0)


@pytest.mark.parametrize("power", range(9))
def test_every_fp16_element_under_every_absmax(power):
    # |x / scale| is no more than the absmax's, 127; what is larger can be no element of its row.
    scale = SIGNIFICANDS / 127
    x = (SIGNIFICANDS / 2**power).repeat(1024, 1).minimum(SIGNIFICANDS.unsqueeze(1))
    y = torch.empty(1024, 1024, dtype=torch.int8)
    interpret(quantize_kernel)[(1,)](x, scale, y, ROWS=1024, COLUMNS=1024)
    assert torch.equal(y, torch.round(x / scale.unsqueeze(1)).to(torch.int8))


def test_without_the_correction_ties_would_flip():
    """What the correction is for: the product with the reciprocal alone is wrong for some pairs."""
    scale = SIGNIFICANDS.unsqueeze(1) / 127
    x = SIGNIFICANDS.minimum(SIGNIFICANDS.unsqueeze(1))
    assert not torch.equal(torch.round(x * (1 / scale)), torch.round(x / scale))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_in_operators_are_the_references_but_for_ties(dtype, threshold):
    x = torch.randn(64, 3000, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-7, 2, 64).unsqueeze(1)
    x[5], x[6] = 0.0, 1e-40  # their scale is the smallest there is
    x = x.to(dtype)
    x_int8, x_scale, x_outlier = quantize_rows(x, threshold)
    expected_int8, expected_scale, expected_outlier, _ = quantize_reference(x, threshold, "token")
    assert torch.equal(x_scale, expected_scale) and float(x_scale.min()) == MIN_SCALE
    assert torch.equal(x_outlier, expected_outlier)
    regular = torch.where(x.abs() >= threshold, 0, x) if threshold else x
    steps = regular.double() / x_scale.double().unsqueeze(1)
    assert ((x_int8 - steps).abs() <= 0.5 + ROUND_OFF).all()
    is_tie = (steps - steps.floor() - 0.5).abs() <= ROUND_OFF
    assert torch.equal(x_int8[~is_tie], expected_int8[~is_tie])


def test_rows_in_operators_with_infinity_and_nan():
    """An infinity is an outlier, if there are any, and a NaN makes its row's scale NaN."""
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    x[1, 3], x[2, 4], x[3, 5] = float("inf"), float("nan"), float("-inf")
    for threshold in (0.0, 6.0):
        x_int8, x_scale, x_outlier = quantize_rows(x, threshold)
        expected = quantize_reference(x, threshold, "token")
        torch.testing.assert_close(x_scale, expected[1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(x_outlier, expected[2])
        rows = x_scale.isfinite()
        assert rows.tolist() == [True, threshold != 0, False, threshold != 0]
        assert torch.equal(x_int8[rows], expected[0][rows])
