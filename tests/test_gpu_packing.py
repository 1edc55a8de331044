"""How a GPU keeps a weight: any K, and rows that start aligned."""

import pytest
import torch

from int8fx.kernels import table
from int8fx.kernels.gpu import packing


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
