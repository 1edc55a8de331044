"""No vector load at an address that no vector may have, for sizes that 16 does not divide.

Triton compiles a kernel anew for each set of sizes that 16 divides, so two compiles stand for all odd
shapes: a vocabulary of 32001 over K = 4096, and a model in which nothing divides anything.
"""

from collections.abc import Callable

import pytest
import triton
import triton.language as tl

from int8fx.testing.gpuless import specimens
from int8fx.testing.nogpu import alignment, offline

# Output channels of real heads that 16 does not divide: Llama with a padding token, GPT-2, Whisper,
# BERT, and a classifier of three labels.
HEADS = 32001, 50257, 51865, 30522, 3
WIDTHS = ("N", "N0", "N1", "N2")
ROWS = ("M", "S", "E")
LENGTHS = ("K", "G")
# sm_86, sm_89 and sm_120 have sm_80's tables and layouts.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SPECIMENS = [specimen for arch in ARCHITECTURES for specimen in specimens.specimens(arch)]
OF_LINEARS = [specimen for specimen in SPECIMENS if set(WIDTHS) & set(specimen.signature)]


def test_of_these_heads_16_divides_none():
    assert all(width % 16 for width in HEADS)


@pytest.mark.parametrize("specimen", OF_LINEARS, ids=str)
def test_with_an_odd_number_of_output_channels(specimen):
    assert specimen.misaligned((*WIDTHS, *ROWS)) == []


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_with_nothing_that_divides(specimen):
    assert specimen.misaligned((*WIDTHS, *ROWS, *LENGTHS)) == []


@triton.jit
def hinted_kernel(scale_ptr, y_ptr, N, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.max_contiguous(tl.multiple_of(columns % N, BLOCK), BLOCK)
    tl.store(y_ptr + columns, tl.load(scale_ptr + n), mask=columns < N)


@triton.jit
def wrapped_kernel(scale_ptr, y_ptr, N, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(scale_ptr + columns % N), mask=columns < N)


@triton.jit
def row_kernel(x_ptr, y_ptr, M, K, BLOCK: tl.constexpr):
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y_ptr + row * BLOCK + k, tl.load(x_ptr + row % M * K + k))


def misaligned(kernel: Callable, sizes: dict[str, bool]) -> list[str]:
    """Of a kernel with two pointers to fp32, and sizes that 16 divides or not."""
    first, second = kernel.arg_names[:2]
    signature = {first: "*fp32", second: "*fp32"} | dict.fromkeys(sizes, "i32")
    unaligned = [name for name, divides in sizes.items() if not divides]
    compiled = offline.compile_kernel(kernel, "sm_90", signature, {"BLOCK": 1024}, 4, 3, unaligned)
    aligned = [2 + number for number, divides in enumerate(sizes.values()) if divides]
    return alignment.misaligned(compiled.asm["ptx"], {0: 4, 1: 4}, aligned)


def test_the_check_notices_a_remainder_that_is_called_contiguous():
    """Negative control: 1024 scales in vectors of four, two a thread."""
    found = misaligned(hinted_kernel, {"N": False})
    assert len(found) == 2 and all("ld.global.v4.b32" in load for load in found)


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        (hinted_kernel, {"N": True}),
        (wrapped_kernel, {"N": False}),
        (wrapped_kernel, {"N": True}),
        (row_kernel, {"M": False, "K": True}),
        (row_kernel, {"M": False, "K": False}),
    ],
    ids=str,
)
def test_the_check_lets_pass_what_is_aligned(kernel, sizes):
    assert misaligned(kernel, sizes) == []
