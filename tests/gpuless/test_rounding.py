"""Quantising without a division, for every pair of an element and its row's absmax."""

import pytest
import torch
import triton
import triton.language as tl
from nogpu.interpreter import interpret

from int8fx.kernels.gpu.rounding import quantize


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
