"""The block Hadamard rotation against matrices that are built from their definition."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8fx.kernels.ops import rotation as ops
from int8fx.kernels.ops.rotation import ROTATIONS, allowed_blocks, block_of, rotated_columns
from int8fx.testing.rotations import matrix, rotation_error

EACH = [(rotation, block) for rotation in ROTATIONS for block in allowed_blocks(rotation)]
each_rotation = pytest.mark.parametrize(("rotation", "block"), EACH)

REGULAR_4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])


def regular(size: int) -> Tensor:
    """Kronecker powers of the regular matrix of 4; of an odd power of 2, one factor of 2 first."""
    bits = size.bit_length() - 1
    result = torch.tensor([[1, 1], [1, -1]]) if bits % 2 else torch.ones(1, 1, dtype=torch.int64)
    for _ in range(bits // 2):
        result = torch.kron(result, REGULAR_4)
    return result


@each_rotation
def test_rotating_is_the_product_with_the_matrix(rotation, block):
    x = torch.randn(3, 2 * block, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ matrix(2 * block, block, rotation)
    error = (ops.rotate(x, block, rotation).double() - expected).abs()
    assert (error <= rotation_error(x, block, rotation)).all()
    assert error.max() < 1e-5


@each_rotation
def test_the_matrix_is_orthogonal_and_the_weight_has_the_other_factor(rotation, block):
    H = matrix(block, block, rotation)
    size = math.log2(block)
    assert torch.equal(H @ H.t(), torch.eye(block, dtype=torch.float64) * block * 4.0 ** -(size // 2))
    rotated = ops.rotate_weight(torch.eye(block), block, rotation)
    assert torch.equal(rotated.double(), H * 2.0 ** (size // 2) * 2.0 ** -math.ceil(size / 2))


@pytest.mark.parametrize("block", allowed_blocks("hadamard"))
def test_files_hold_the_regular_matrix(block):
    """ConvRot's, as the Kronecker power that its paper names: ``w Hᵀ``, and H is symmetric there."""
    H = regular(block)
    assert torch.equal(H @ H.t(), torch.eye(block, dtype=torch.int64) * block)
    rotated = ops.to_regular(ops.rotate(torch.eye(block), block, "hadamard"), block, block, "hadamard")
    factor = 2.0 ** ((block.bit_length() - 1) // 2)
    assert torch.equal(rotated * factor, H.t().float())
    if block in allowed_blocks("convrot"):
        assert set(H.sum(0).tolist()) == {math.isqrt(block)}  # regular: no column gathers an offset


@each_rotation
def test_the_order_of_files_goes_there_and_back(rotation, block):
    w_int8 = torch.randint(-127, 128, (5, 3 * block), dtype=torch.int8)
    stored = ops.to_regular(w_int8, 3 * block, block, rotation)
    assert stored.dtype == torch.int8
    assert torch.equal(ops.from_regular(stored, 3 * block, block, rotation), w_int8)


def test_random_signs_are_those_of_a_generator_with_a_seed():
    generator = random.Random(0)
    words = [generator.getrandbits(64) for _ in range(4)]
    expected = [bool(word >> bit & 1) for word in words for bit in range(64)]
    assert [ops.is_negative(j, "random-signs") for j in range(256)] == expected
    assert 100 < sum(expected) < 156


@pytest.mark.parametrize(
    ("K", "block", "rotation", "size", "columns"),
    [
        (576, 64, "hadamard", 64, 576),
        (576, 256, "hadamard", 64, 576),
        (576, 256, "convrot", 64, 576),
        (96, 256, "hadamard", 32, 96),
        (96, 256, "convrot", 16, 96),
        (100, 64, "hadamard", 64, 128),
        (100, 16, "hadamard", 16, 112),
        (8, 64, "hadamard", 64, 64),
        (1, 16, "convrot", 16, 16),
        (4864, 64, "hadamard", 64, 4864),
    ],
)
def test_blocks_of_any_k(K, block, rotation, size, columns):
    assert block_of(K, block, rotation) == size
    assert rotated_columns(K, block, rotation) == columns
    assert ops.rotate(torch.ones(2, K), block, rotation).shape == (2, columns)


@settings(max_examples=100, deadline=None)
@given(
    K=st.integers(1, 600),
    case=st.sampled_from(EACH),
    exponent=st.integers(-120, 100),
    seed=st.integers(0, 2**16),
)
def test_any_k_against_float64(K, case, exponent, seed):
    """The bound of the docstring; a product of two rotated sides; and the way back."""
    rotation, block = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, K, generator=generator).exp() * 2.0**exponent
    w = torch.randn(2, K, generator=generator)
    rotated, H = ops.rotate(x, block, rotation), matrix(K, block, rotation)
    error = rotation_error(x, block, rotation)
    assert ((rotated.double() - x.double() @ H).abs() <= error).all()
    product = rotated.double() @ ops.rotate_weight(w, block, rotation).double().t()
    exact = x.double() @ w.double().t()
    size = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1)
    assert ((product - exact).abs() <= 1e-5 * size).all()
    w_back = ops.rotate_back(ops.rotate_weight(w, block, rotation), K, block, rotation)
    torch.testing.assert_close(w_back, w, rtol=1e-5, atol=1e-5)
    x_back = ops.rotate_back_input(rotated.double(), K, block, rotation)
    assert ((x_back - x.double()).norm(dim=1) <= 1e-5 * x.double().norm(dim=1)).all()


@each_rotation
def test_a_cut_between_blocks_changes_nothing(rotation, block):
    """What makes shards of K independent of how many there are."""
    x = torch.randn(3, 4 * block, generator=torch.Generator().manual_seed(0))
    whole = ops.rotate(x, block, rotation)
    parts = [ops.rotate(part, block, rotation) for part in x.split([block, 3 * block], 1)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    rotated = ops.rotate(x, 64, "hadamard")[0]
    assert torch.equal(rotated[:64], torch.zeros(64))
    assert torch.equal(rotated[64:].abs(), torch.ones(64))


def test_a_constant_is_spread_too():
    """Sylvester's row of ones would gather it in one element, of 64 / 8 times its size."""
    rotated = ops.rotate(torch.ones(1, 64), 64, "hadamard")
    assert torch.equal(rotated.abs(), torch.ones(1, 64))
