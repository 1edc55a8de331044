"""How a GPU keeps a weight: any K, and rows that start aligned."""

import pytest
import torch

from int8fx.kernels import table
from int8fx.kernels.formats.codes import unpack_bits
from int8fx.kernels.gpu import grouped_packing, packing
from int8fx.kernels.ops import grouped_linear


@pytest.mark.parametrize("K", [1, 15, 16, 17, 99, 4096])
def test_a_packed_weight_is_aligned_and_comes_back_bit_for_bit(K):
    w_int8 = torch.randint(-127, 128, (5, K), dtype=torch.int8)
    packed = packing.pack(w_int8)
    assert packed.shape == packing.packed_shape(5, K)
    assert packed.is_contiguous() and packed.shape[1] % 16 == 0 and packed.shape[1] - K < 16
    assert not packed[:, K:].any()
    assert torch.equal(packing.unpack(packed, 5, K), w_int8)
    assert (packed is w_int8) == (K % 16 == 0)


def test_the_table_packs_so_for_a_gpu():
    row = table.KERNELS[table.key_of("cuda")]
    assert row.packed_shape(5, 99) == (5, 112)
    w_int8 = torch.randint(-127, 128, (5, 99), dtype=torch.int8)
    assert torch.equal(row.unpack(row.pack(w_int8), 5, 99), w_int8)


def test_a_row_of_x_is_given_zeros():
    x = torch.randn(2, 3, 99)
    padded = packing.padded_rows(x)
    assert padded.shape == (2, 3, 112)
    assert torch.equal(padded[..., :99], x) and not padded[..., 99:].any()


@pytest.mark.parametrize("stored", [1, 8, 31, 32, 33, 64, 130])
def test_codes_of_four_bits_are_aligned_and_come_back_bit_for_bit(stored):
    """In a shape that they are never stored in, by which packed ones are told from stored ones."""
    codes = torch.randint(0, 256, (5, stored), dtype=torch.uint8)
    packed = grouped_packing.pack(codes)
    assert packed.shape == grouped_packing.packed_shape(5, stored) != codes.shape
    assert packed.is_contiguous() and packed.numel() == 5 * grouped_packing.row_bytes(stored)
    assert torch.equal(grouped_packing.unpack(packed, 5, stored), codes)


def test_a_byte_has_codes_that_are_32_columns_apart():
    codes = torch.randint(0, 256, (3, 64), dtype=torch.uint8)
    columns = unpack_bits(codes, 4)
    rows = grouped_packing.pack(codes).view(3, 64)
    assert torch.equal(rows[:, 32:] & 15, columns[:, 64:96])
    assert torch.equal(rows[:, 32:] >> 4, columns[:, 96:])


@pytest.mark.parametrize("operator", grouped_linear.OPERATORS)
def test_the_table_packs_four_bits_so_for_a_gpu(operator):
    row = table.KERNELS[table.key_of("cuda", grouped_linear.FAMILY, operator)]
    codes = torch.randint(0, 256, (5, 33), dtype=torch.uint8)
    assert tuple(row.pack(codes).shape) == row.packed_shape(5, 33)
    assert torch.equal(row.unpack(row.pack(codes), 5, 33), codes)
