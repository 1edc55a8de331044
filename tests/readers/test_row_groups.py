"""Groups of rows, HQQ's ``axis=0``: a format that files have and ``quantize_`` does not make."""

import copy
import pickle

import pytest
import torch
from torch import nn

import int8fx
from int8fx.kernels.formats.row_groups import row_groups
from int8fx.kernels.schemes.row_groups import WNA16_ROWS
from int8fx.weights.tensor import QuantizedWeight

N, K = 96, 64


def weight(**settings) -> QuantizedWeight:
    torch.manual_seed(0)
    return QuantizedWeight.quantized(torch.randn(N, K), WNA16_ROWS.choice(**settings), False)


@pytest.mark.parametrize("zeros", ["middle", "integer", "float", "offset"])
@pytest.mark.parametrize("rows", [96, 100, 8])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_a_weight_is_rounded_to_its_grid(bits, rows, zeros):
    floats = torch.randn(rows, K)
    kept = row_groups(bits, 16, zeros)
    stored = kept.quantize(floats)
    assert [tuple(part.shape) for part in stored] == list(kept.shapes(rows, K))
    w_hat = kept.dequantize(stored, rows, K)
    groups = -(-rows // 16)
    for group in range(groups):
        # The rows of a group are as many apart as there are groups.
        assert all(len(column.unique()) <= 2**bits for column in w_hat[group::groups].t())
    step = (floats.amax() - floats.amin()) / (2**bits - 1)
    assert (w_hat - floats).abs().max() <= step * (3 if zeros == "middle" else 1.5)


def test_it_computes_copies_pickles_and_is_saved(tmp_path):
    linear = nn.Linear(K, N).requires_grad_(False)
    linear.weight = nn.Parameter(weight(), requires_grad=False)
    x = torch.randn(5, K)
    expected = nn.functional.linear(x, linear.weight.dequantize(), linear.bias)
    torch.testing.assert_close(linear(x), expected)
    for again in (copy.deepcopy(linear.weight), pickle.loads(pickle.dumps(linear.weight))):
        assert torch.equal(again.dequantize(), linear.weight.dequantize())
    assert torch.equal(linear.weight[:32], linear.weight.dequantize()[:32])  # a float copy


def test_no_option_names_it():
    with pytest.raises(ValueError, match="wna16-rows"):
        int8fx.quantize_(nn.Linear(K, N), scheme="wna16-rows")
