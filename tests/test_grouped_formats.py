"""Weights of a few bits: what is stored, and what it stands for, against formulas written out here."""

import itertools
import math

import pytest
import torch

from int8fx.kernels.formats.codebook import (
    CODEBOOKS,
    absmax_of,
    codebook,
    dynamic_map,
    from_bitsandbytes,
    nest,
)
from int8fx.kernels.formats.codes import codes_in_a_byte, pack_bits, unpack_bits
from int8fx.kernels.formats.grouped import (
    WHOLE,
    ZEROS,
    from_codes,
    grouped,
    needs_order,
    order_of,
)

BITS = (1, 2, 3, 4, 5, 6, 8)
each_zeros = pytest.mark.parametrize("zeros", ZEROS)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(N, K, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)


def zeros_for(zeros, N, G, bits):
    if zeros == "middle":
        return None
    if zeros == "integer":
        return random_codes(N, G, bits, seed=7)
    return numbers(N, G, seed=8)


def written_out(codes, scale, zero_point, g_idx, bits, zeros):
    """(code - zero) · scale, element by element, in fp32."""
    N, K = codes.shape
    w_hat = torch.empty(N, K)
    for n, k in itertools.product(range(N), range(K)):
        code, step = codes[n, k].float(), scale[n, g_idx[k]].float()
        if zeros == "offset":
            w_hat[n, k] = code * step + zero_point[n, g_idx[k]].float()
        else:
            zero = 2 ** (bits - 1) if zero_point is None else zero_point[n, g_idx[k]].float()
            w_hat[n, k] = (code - zero) * step
    return w_hat


# --- codes in bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("K", [1, 7, 8, 33])
def test_codes_come_back(bits, K):
    codes = random_codes(3, K, bits)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, math.ceil(K / codes_in_a_byte(bits)))
    assert torch.equal(unpack_bits(packed, bits)[:, :K], codes)


def test_the_first_code_is_in_the_lowest_bits():
    assert pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_bits(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00111001]]


# --- by groups ------------------------------------------------------------------------------------


@each_zeros
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("K", "group"), [(32, 16), (40, 16), (24, WHOLE), (7, WHOLE), (64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_of_a_file_stand_for_the_formula(zeros, bits, K, group, dtype):
    N, width = 3, K if group == WHOLE else group
    G = math.ceil(K / width)
    codes, scale = random_codes(N, K, bits), numbers(N, G, seed=1).to(dtype)
    zero_point = zeros_for(zeros, N, G, bits)
    g_idx = torch.arange(K) // width
    kept = grouped(bits, group, zeros)
    stored = from_codes(codes, scale, zero_point, None, bits, group, zeros)
    assert tuple(tuple(part.shape) for part in stored) == kept.shapes(N, K)
    expected = written_out(codes, scale, zero_point, g_idx, bits, zeros)
    assert torch.equal(kept.dequantize(stored, N, K), expected)


@pytest.mark.parametrize(("K", "group"), [(32, 16), (40, 16), (128, 32)])
def test_columns_of_one_group_need_not_lie_side_by_side(K, group):
    N, bits = 4, 4
    G = math.ceil(K / group)
    shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    g_idx = torch.empty(K, dtype=torch.int32)
    g_idx[shuffled] = (torch.arange(K) // group).to(torch.int32)
    codes, scale, zero_point = random_codes(N, K, bits), numbers(N, G), random_codes(N, G, bits, 5)
    stored = from_codes(codes, scale, zero_point, g_idx, bits, group)
    kept = grouped(bits, group, "integer", act_order=True)
    assert [part.name for part in kept.parts] == ["packed", "scale", "zero_point", "order"]
    expected = written_out(codes, scale, zero_point, g_idx, bits, "integer")
    assert torch.equal(kept.dequantize(stored, N, K), expected)
    assert torch.equal(g_idx[stored[-1].long()], g_idx.sort().values)
    assert kept.column_step == 0 and kept.can_cut(slice(1, 3), slice(0, K), N, K)


def test_groups_in_order_need_no_permutation():
    in_order = torch.arange(64) // 16
    assert not needs_order(in_order, 16) and not needs_order(torch.zeros(64), WHOLE)
    assert needs_order(in_order.flip(0), 16)
    assert order_of(in_order, 64, 16).tolist() == list(range(64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": torch.full((2, 32), 16, dtype=torch.uint8)}, ["codes has 16 to 16", "0 to 15"]),
        ({"codes": torch.zeros(2, 32)}, ["codes is torch.float32", "integers"]),
        ({"scale": torch.ones(2, 3)}, ["scale has shape [2, 3]", "[2, 2]"]),
        ({"scale": torch.ones(2, 2, dtype=torch.int8)}, ["scale is torch.int8"]),
        ({"zero_point": torch.zeros(1, 2)}, ["zero_point has shape [1, 2]", "[2, 2]"]),
        ({"zero_point": torch.full((2, 2), -1)}, ["zero_point has -1 to -1", "0 to 255"]),
        ({"g_idx": torch.zeros(32, dtype=torch.int32)}, ["groups of [32] columns", "16 in each"]),
        ({"g_idx": torch.zeros(31, dtype=torch.int32)}, ["g_idx has shape [31]", "[32]"]),
        ({"zeros": "offset"}, ["zeros is 'offset'", "as zero_point is given"]),
        ({"zeros": "none"}, ["zeros is 'none'", "middle, integer, float, offset"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, words):
    given = {
        "codes": random_codes(2, 32, 4),
        "scale": torch.ones(2, 2),
        "zero_point": None,
        "g_idx": None,
        "bits": 4,
        "group": 16,
    }
    with pytest.raises(ValueError, match="from_codes") as raised:
        from_codes(**(given | change))
    assert [word for word in words if word not in str(raised.value)] == []


@each_zeros
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantised_to_the_nearest_or_to_an_end(bits, zeros):
    """No other code of the group's grid is nearer, and a searched clip is no worse than none."""
    weight = numbers(8, 64)
    kept = grouped(bits, 32, zeros)
    stored = kept.quantize(weight)
    w_hat = kept.dequantize(stored, 8, 64)
    codes = unpack_bits(stored[0], bits)
    for step in (-1, 1):
        moved = (codes.int() + step).clamp(0, 2**bits - 1).to(torch.uint8)
        other = kept.dequantize((pack_bits(moved, bits), *stored[1:]), 8, 64)
        assert ((w_hat - weight).abs() <= (other - weight).abs() + 1e-5).all()
    groups = weight.unflatten(1, (-1, 32))
    ends = groups.abs().amax(-1) if zeros == "middle" else groups.amax(-1) - groups.amin(-1)
    step = ends / (max(1, 2 ** (bits - 1) - 1) if zeros == "middle" else 2**bits - 1)
    # A grid over the whole range is off by half a step at most, and was among those that were tried.
    unclipped = torch.round(groups / step.unsqueeze(-1)) * step.unsqueeze(-1)
    if zeros == "middle":
        assert (w_hat - weight).norm() <= (unclipped - groups).norm() * 1.0001
    assert ((w_hat - weight).square().unflatten(1, (-1, 32)).mean(-1) <= step.square() / 4).all()


@each_zeros
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_have_the_weights_dtype(zeros, dtype):
    weight = numbers(4, 64).to(dtype)
    stored = grouped(4, 16, zeros).quantize(weight)
    assert stored[1].dtype == dtype
    assert all(part.dtype in (dtype, torch.uint8) for part in stored)
    w_hat = grouped(4, 16, zeros).dequantize(stored, 4, 64)
    assert (w_hat - weight).norm() / weight.norm() < 0.12


@each_zeros
def test_rows_of_zeros_and_of_the_largest_floats_stay_finite(zeros):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.zeros(3, 32, dtype=dtype)
        weight[1] = torch.finfo(dtype).max
        weight[2, ::2] = -torch.finfo(dtype).max
        stored = grouped(4, 16, zeros).quantize(weight)
        w_hat = grouped(4, 16, zeros).dequantize(stored, 3, 32)
        assert not w_hat[0].any() and w_hat.isfinite().all()


# --- codebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("K", [64, 130])
def test_a_code_is_the_nearest_of_16_values(name, nested, K):
    weight = numbers(5, K)
    kept = codebook(name, 64, nested)
    stored = kept.quantize(weight)
    w_hat = kept.dequantize(stored, 5, K)
    absmax = absmax_of(stored[1:]).repeat_interleave(64, 1)[:, :K]
    candidates = torch.tensor(CODEBOOKS[name]) * absmax.unsqueeze(-1)
    nearest = (candidates - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((w_hat - weight).abs(), nearest, rtol=0, atol=1e-6)


def test_signs_of_a_block_whose_double_quantised_absmax_is_below_0():
    """Blocks of small weights between large ones: 8 bits of the absmax leave theirs a step off."""
    weight = torch.randn(8, 64 * 16, generator=torch.Generator().manual_seed(0))
    weight[:, :64] *= 1e-3
    weight[:, 64:128] *= 4
    kept = codebook("nf4", 64, nested=True)
    stored = kept.quantize(weight)
    absmax = absmax_of(stored[1:])[:, 0]
    assert (absmax < 0).any()
    w_hat = kept.dequantize(stored, *weight.shape)[:, :64]
    candidates = torch.tensor(CODEBOOKS["nf4"]) * absmax.view(-1, 1, 1)
    nearest = (candidates - weight[:, :64].unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((w_hat - weight[:, :64]).abs(), nearest, rtol=0, atol=1e-6)


def test_double_quantised_absmax_is_within_a_step_of_the_dynamic_map():
    absmax = numbers(7, 300).abs() + 1
    codes, largest, offset = nest(absmax)
    assert codes.dtype == torch.uint8 and largest.shape == (7, 2) and offset.unique().numel() == 1
    # The map's values near 1 are 9/640 apart, so the nearest is off by less than that.
    error = (absmax_of((codes, largest, offset)) - absmax).abs()
    assert (error <= 9 / 640 * largest.repeat_interleave(256, 1)[:, :300]).all()


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize(("N", "K"), [(4, 128), (3, 80), (6, 50), (4, 33)])
def test_weights_of_bitsandbytes_come_out_bit_for_bit(name, N, K):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = numbers(N, K)
    # As one long row: its decoder for a CPU begins a block anew in each row, and its encoder does not.
    packed, state = functional.quantize_4bit(weight.flatten(), blocksize=64, quant_type=name)
    expected = functional.dequantize_4bit(packed, state).reshape(N, K)
    block, stored = from_bitsandbytes(packed, state.absmax, N, K, 64)
    kept = codebook(name, block)
    assert tuple(tuple(part.shape) for part in stored) == kept.shapes(N, K)
    assert torch.equal(kept.dequantize(stored, N, K), expected)


def test_the_dynamic_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert dynamic_map() == tuple(functional.create_dynamic_map().tolist())


def test_a_weight_of_bitsandbytes_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"256 bytes and 8 absmax; given: 255 and 8"):
        from_bitsandbytes(torch.zeros(255, 1, dtype=torch.uint8), torch.ones(8), 4, 128, 64)
