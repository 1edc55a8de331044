"""Weight formats: shapes, cuts and checks follow from the specs of their parts."""

import pytest
import torch

import int8fx
from int8fx.kernels import packing
from int8fx.kernels.formats.format import COLUMNS, ROWS, Axis, Part, WeightFormat, stacked
from int8fx.kernels.formats.groups import grouped
from int8fx.kernels.formats.int8 import OF_BITSANDBYTES, PER_CHANNEL
from int8fx.testing.four_bits import by_groups

FORMATS = {
    kept.name: kept
    for kept in (
        *(scheme.choice().weight_format for scheme in int8fx.SCHEMES.values()),
        *(grouped(16), by_groups(16), by_groups(24)),
    )
}
each_format = pytest.mark.parametrize("kept", FORMATS.values(), ids=FORMATS)


def weight_of(N, K):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


@each_format
@pytest.mark.parametrize(("N", "K"), [(32, 64), (17, 40), (1, 1), (5, 129)])
def test_quantise_gives_what_the_specs_say(kept, N, K):
    stored = kept.quantize(weight_of(N, K))
    assert tuple(tuple(part.shape) for part in stored) == kept.shapes(N, K)
    # None: of the weight's own dtype.
    assert [part.dtype for part in stored] == [part.dtype or torch.float32 for part in kept.parts]
    zeros = kept.zeros(N, K, torch.float32, torch.device("cpu"))
    assert [part.shape for part in zeros] == [part.shape for part in stored]
    assert kept.dequantize(stored, N, K).shape == (N, K)
    assert not kept.dequantize(zeros, N, K).any()


@each_format
@pytest.mark.parametrize(("N", "K"), [(32, 64), (17, 40)])
def test_packing_is_undone_bit_for_bit(kept, N, K):
    stored = kept.quantize(weight_of(N, K))
    packed = packing.pack(kept, stored, N, K)
    assert len(packed) == len(kept.packed_names)
    assert kept.rows(packed) == N
    assert all(map(torch.equal, packing.unpack(kept, packed, N, K), stored))


@each_format
def test_a_cut_has_the_values_of_the_whole(kept):
    N, K = 32, 96
    stored = kept.quantize(weight_of(N, K))
    values = kept.dequantize(stored, N, K)
    for rows, columns in ((slice(8, 20), slice(0, K)), (slice(0, N), slice(48, K))):
        cut = kept.can_cut(rows, columns, N, K)
        if kept.column_step in (1, 16, 24):
            assert cut
        if cut:
            piece = kept.cut(stored, rows, columns)
            form = rows.stop - rows.start, columns.stop - columns.start
            assert tuple(tuple(part.shape) for part in piece) == kept.shapes(*form)
            assert torch.equal(kept.dequantize(piece, *form), values[rows, columns])
            assert all(part.is_contiguous() for part in piece)


@pytest.mark.parametrize(
    ("columns", "falls_on_groups"),
    [
        ((0, 16), True),
        ((16, 32), True),
        ((32, 40), True),
        ((0, 40), True),
        ((8, 40), False),
        ((0, 20), False),
    ],
)
def test_columns_are_cut_at_groups_or_at_the_end(columns, falls_on_groups):
    for kept in (grouped(16), by_groups(16)):
        assert kept.can_cut(slice(0, 4), slice(*columns), 4, 40) is falls_on_groups


def test_a_part_about_all_columns_is_cut_along_rows_alone():
    index = Part("index", torch.int64, (2,), of_all_columns=True)
    outside = Part("outside", None, (ROWS, 2), of_all_columns=True)
    kept = WeightFormat("with columns", (*PER_CHANNEL.parts, outside, index), PER_CHANNEL.quantize, len)
    assert kept.column_step == 0
    assert not kept.can_cut(slice(0, 8), slice(0, 16), 8, 32)
    assert kept.can_cut(slice(2, 4), slice(0, 32), 8, 32)
    stored = (*PER_CHANNEL.quantize(weight_of(8, 32)), torch.ones(8, 2), torch.tensor([3, 5]))
    shapes = [tuple(part.shape) for part in kept.cut(stored, slice(2, 4), slice(0, 32))]
    assert shapes == [(2, 32), (2,), (2, 2), (2,)]
    assert kept.zeros(8, 32, torch.bfloat16, torch.device("meta"))[2].dtype == torch.bfloat16


@each_format
def test_experts_are_stacked(kept):
    weight = torch.stack([weight_of(16, 32), 2 * weight_of(16, 32)])
    for part, first, second in zip(
        stacked(kept, weight), kept.quantize(weight[0]), kept.quantize(weight[1]), strict=True
    ):
        assert torch.equal(part, torch.stack([first, second]))


def test_axes_divide_and_pad():
    assert [Axis("K", 16).length(size) for size in (16, 17, 40)] == [1, 2, 3]
    assert [Axis("K", multiple=16).length(size) for size in (16, 17, 40)] == [16, 32, 48]
    assert [Axis("K", 2, multiple=16).length(size) for size in (16, 17, 40)] == [8, 16, 24]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": (*PER_CHANNEL.parts, PER_CHANNEL.parts[0])}, "names have to differ"),
        ({"parts": (Part("int8", torch.int8, (COLUMNS, ROWS)),)}, "has to have the rows of the weight"),
        ({"zero_point": True}, "has zero points, and no part 'zero_point'"),
        (
            {"bits": 4, "codebook": (0.0, 1.0)},
            "a codebook of 2 values.*allowed: 16",
        ),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change, message):
    form = {"parts": PER_CHANNEL.parts, "quantize": PER_CHANNEL.quantize, "dequantize": len}
    with pytest.raises(ValueError, match=message):
        WeightFormat("a test's", **(form | change))


def test_formats_that_store_the_same_read_each_others_files():
    files = {name: kept.files for name, kept in FORMATS.items()}
    same = {name for name, stored in files.items() if stored == PER_CHANNEL.name}
    plain = {name for name in files if "rotated" not in name}
    assert same == {name for name in plain if "per channel" in name or "per tensor" in name}
    assert OF_BITSANDBYTES.files != PER_CHANNEL.files
    assert by_groups(16).files != by_groups(24).files
