"""Each kernel alone, inside poisoned memory, over shapes and outlier placements.

Every run is also a test of bounds: operands lie between NaN, results are checked to have left what is
around them alone (``nogpu/guard.py``). Here in the interpreter; ``tests/test_gpu.py`` runs the same on
a GPU.
"""

import heapq
import math

import pytest
import torch
import triton.runtime.interpreter as stock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8fx.kernels.gpu.columns import candidate_rows, outlier_columns_reference
from int8fx.kernels.gpu.configs import (
    EXPERTS,
    GEMM,
    gemm_configs,
    product_tiles,
)
from int8fx.kernels.gpu.decode import MAX_M
from int8fx.kernels.gpu.gather import (
    launch_shape,
    quantize_gather_reference,
    w_capacity,
    x_capacity,
)
from int8fx.kernels.gpu.norm import (
    NORMS,
    norm_shape,
    norm_statistics,
    normalized_reference,
)
from int8fx.kernels.gpu.residues import outlier_residues, residues_reference
from int8fx.kernels.gpu.rounding import quantize_rows
from int8fx.kernels.ops.quantize_reference import quantize_reference, quantize_weight
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.kernel_runs import (
    EPS,
    THRESHOLD,
    TOLERANCE,
    Case,
    check_product,
    normed,
    run_decode,
    run_norm,
    run_quantize_gather,
)
from int8fx.testing.gpuless.where import is_on_a_gpu
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like

DTYPES = st.sampled_from(list(TOLERANCE))
THOROUGH = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn, rows: st.SearchStrategy[int]) -> Case:
    M, K = draw(rows), draw(st.integers(1, 150))
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    dtype, share = draw(DTYPES), draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(M, K)
    hot = torch.rand(K, generator=generator) < share
    x[torch.randint(M, (K,), generator=generator), torch.arange(K)] += 20.0 * hot
    packed = [quantize_weight(normal(N, K)) for N in widths]
    has_bias = draw(st.booleans())
    return Case(
        poisoned(x.to(dtype)),
        [poisoned(w_int8) for w_int8, _ in packed],
        [poisoned(w_scale) for _, w_scale in packed],
        [poisoned(normal(N).to(dtype)) for N in widths] if has_bias else [],
    )


def test_the_guard_notices_a_store_outside():
    x = poisoned(torch.zeros(4))
    torch.as_strided(x, (1,), (1,), x.storage_offset() + 4).fill_(0.0)
    with pytest.raises(AssertionError, match="was overwritten"):
        assert_intact(x)


def test_candidate_rows_name_an_outlier_of_each_column_that_has_one():
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    columns = outlier_columns_reference(x, 2.0)
    rows = candidate_rows(x, 2.0)[0].long()
    assert 0 < columns.sum() < 70
    assert (x[rows[columns], columns.nonzero().squeeze(1)].abs() >= 2.0).all()


# Of rows that do not stay in registers, and of gathered rows in more than one block.
NARROW = {"CHUNK": 32, "CHUNKS": 0, "LIST_BLOCK": 4, "GATHER_ROWS": 16}
CHUNKED = {"CHUNK": 32, "LIST_BLOCK": 4}
STEPS = {"ROWS": 2, "STEPS": 3}


@THOROUGH
@given(cases(st.integers(1, 40)), st.sampled_from([{}, NARROW, CHUNKED, STEPS, CHUNKED | STEPS]))
def test_quantize_gather(case, blocks):
    done = run_quantize_gather(case, **blocks)
    expected = quantize_gather_reference(case.x.clone(), case.weights, THRESHOLD)
    count = int(done["count"])
    assert count == int(expected[-1])
    assert torch.equal(done["x_int8"], expected[0])
    assert torch.equal(done["x_scale"], expected[1])
    for name, gathered in zip(("x_gathered", "w_gathered"), expected[2:4], strict=True):
        assert torch.equal(done[name][:, :count], gathered)
        assert not done[name][:, count : -(-count // 32) * 32].any()


def sifted(x: Tensor) -> Tensor:
    return torch.where(x.float().abs() >= THRESHOLD, x, 0.0)


@pytest.mark.parametrize("kind", NORMS)
@THOROUGH
@given(cases(st.integers(1, 40)), st.sampled_from([{}, CHUNKED, STEPS, CHUNKED | STEPS]))
def test_quantize_gather_of_a_norm(kind, case, blocks):
    norm = normed(case, kind)
    expected = quantize_gather_reference(norm.h, case.weights, THRESHOLD)
    columns, count = outlier_columns_reference(norm.h, THRESHOLD), int(expected[-1])
    for quantizes in (True, False):
        done = run_quantize_gather(case, quantizes=quantizes, norm=norm, **blocks)
        assert int(done["count"]) == count
        gathered = norm.h[:, columns]
        assert torch.equal(done["x_gathered"][:, :count], gathered if quantizes else sifted(gathered))
        assert torch.equal(done["w_gathered"][:, :count], expected[3])
        if quantizes:
            assert torch.equal(done["x_int8"], expected[0])
            assert torch.equal(done["x_scale"], expected[1])


@pytest.mark.parametrize("kind", NORMS)
@THOROUGH
@given(cases(st.integers(1, 40)), st.booleans(), st.booleans(), st.sampled_from([None, 32]))
def test_norm(kind, case, adds, quantizes, chunk):
    norm, x = normed(case, kind), case.x
    if adds:
        addend, x = poisoned(x / 2), poisoned(x - x / 2)
        made = run_norm(x, norm, addend, quantizes, chunk)
        assert torch.equal(made["sum"], x + addend)
        x = made["sum"].clone()
    else:
        made = run_norm(x, norm, None, quantizes, chunk)
    mean, rstd = norm_statistics(x, kind, EPS)
    torch.testing.assert_close(made["statistics"][0], rstd[:, 0], rtol=1e-5, atol=0)
    if kind.startswith("layer"):
        torch.testing.assert_close(made["statistics"][1], mean[:, 0], rtol=1e-5, atol=1e-5)
        mean = made["statistics"][1].unsqueeze(1)
    h = normalized_reference(x, mean, made["statistics"][0].unsqueeze(1), *norm.operands[1:], kind)
    columns = outlier_columns_reference(h, THRESHOLD)
    candidates = made["candidate_rows"].long()
    assert torch.equal(candidates >= 0, columns)
    assert (h[candidates[columns], columns.nonzero()[:, 0]].float().abs() >= THRESHOLD).all()
    if quantizes:
        x_int8, x_scale, _ = quantize_rows(h, THRESHOLD)
        assert torch.equal(made["x_scale"], x_scale)
        # A GPU rounds the product and the sum that rounds it at once.
        assert (made["x_int8"].int() - x_int8.int()).abs().max() <= (1 if is_on_a_gpu() else 0)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_has_a_norm_of_nan_and_the_others_are_what_they_were(kind, value):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    plain = run_norm(poisoned(x), normed(Case(x, [], [], []), kind))
    x[2, 7] = value
    done = run_norm(poisoned(x), normed(Case(x, [], [], []), kind))
    assert torch.equal(done["x_scale"].isnan(), torch.arange(5) == 2)
    others = torch.arange(5) != 2
    for name in ("x_int8", "x_scale"):
        assert torch.equal(done[name][others], plain[name][others])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_chunks_cover_a_row_and_leave_little_past_its_end(dtype):
    for K in (1, 33, 576, 768, 3072, 4096, 5120, 7168, 8192, 11008, 14336, 16384, 28672):
        for M in (40, 500, 4096):
            shape = launch_shape(M, K, 4096, dtype)
            covered = shape["CHUNK"] * shape["CHUNKS"]
            if K * dtype.itemsize > 32768:
                assert shape["CHUNKS"] == 0 and shape["STEPS"] == 1  # in a loop
            else:
                assert K <= covered <= max(1.35 * K, 1024)
            assert shape["EVEN_K"] == (K % shape["CHUNK"] == 0)
        x = torch.empty(1, K, dtype=dtype, device="meta")
        shape = norm_shape(x)
        assert K <= shape["CHUNK"] * shape["CHUNKS"] <= max(1.35 * K, 256)


def test_gather_alone_leaves_the_quantised_rows_as_they_are():
    x = torch.zeros(5, 40).index_fill(1, torch.tensor([7, 30]), 9.0)
    w_int8, w_scale = quantize_weight(torch.randn(3, 40))
    case = Case(poisoned(x), [poisoned(w_int8)], [poisoned(w_scale)], [])
    done = run_quantize_gather(case, quantizes=False)
    assert int(done["count"]) == 2
    assert torch.equal(done["w_gathered"][:, :2], w_int8[:, [7, 30]].float())
    assert torch.equal(done["x_int8"], poisoned_like(done["x_int8"]))


@pytest.mark.parametrize("beside", [0.0, 9.0], ids="beside {}".format)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_with_nan_or_infinity_quantise_as_the_reference_does(value, beside):
    """A NaN in a column that another row takes out is no part of its row's scale."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    x[2, 5], x[3, 5] = value, beside
    case = Case(poisoned(x), [poisoned(torch.ones(3, 40, dtype=torch.int8))], [torch.ones(3)], [])
    case.w_scales = [poisoned(scale) for scale in case.w_scales]
    done = run_quantize_gather(case)
    x_int8, x_scale, _, _ = quantize_reference(x, THRESHOLD, "column")
    assert torch.equal(done["x_scale"].isnan(), x_scale.isnan())
    assert bool(x_scale[2].isnan()) == (value != value and beside == 0.0)
    finite = ~x_scale.isnan()
    assert torch.equal(done["x_int8"][finite], x_int8[finite])


ROOM = st.sampled_from([None, 32])  # in w_gathered: for all columns, or for some


@THOROUGH
@given(cases(st.integers(1, 90)), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), ROOM)
def test_product(case, unroll, parts, room):
    check_product(case, unroll, parts, room=room)


@THOROUGH
@given(cases(st.integers(1, 200)), st.integers(1, 12), st.sampled_from([32, 128]), ROOM)
def test_product_in_extended_tiles(case, processors, block_n, room):
    check_product(case, extra_m=16, processors=processors, block_n=block_n, room=room)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("outliers", [31, 32, 33, 64, 90, 100], ids="{} outliers".format)
@pytest.mark.parametrize("extra_m", [0, 16])
def test_columns_that_there_is_no_room_for_are_read_from_the_weight(outliers, parts, extra_m):
    generator = torch.Generator().manual_seed(outliers)
    x = torch.randn(50, 100, generator=generator).clamp(-3, 3)
    x[torch.randint(50, (outliers,), generator=generator), torch.arange(outliers)] = 20.0
    packed = [quantize_weight(torch.randn(N, 100, generator=generator)) for N in (40, 33)]
    weights, w_scales = zip(*packed, strict=True)
    case = Case(poisoned(x.half()), [*map(poisoned, weights)], [*map(poisoned, w_scales)], [])
    check_product(case, parts=1 if extra_m else parts, extra_m=extra_m, room=32)


def test_gathered_weights_are_small_beside_the_weight_however_long_its_rows_are():
    for K in (1, 33, 256, 4096, 14336, 65536):
        room = w_capacity(K)
        assert room % 32 == 0 and room <= x_capacity(K)
        assert room >= min(K, 256)  # columns of the paper's models, many times over
        assert 2 * room <= max(512, K // 8 + 64)  # bytes, where a row of the weight has K


@pytest.mark.parametrize(
    ("M", "processors", "tiles"),
    [
        (40, 2, (0, 4)),  # fewer rows than an extended tile
        (48, 2, (2, 0)),
        (49, 2, (0, 4)),  # two halves more are two plain tiles instead
        (81, 2, (2, 4)),
        (96, 4, (4, 0)),
        (128, 2, (4, 2)),
        (130, 4, (4, 4)),  # of the last two rows, a tile
    ],
)
@pytest.mark.parametrize("outliers", [0, 1, 33, 70], ids="{} outliers".format)
def test_extended_tiles_are_whole_and_plain_ones_follow(M, processors, tiles, outliers):
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, 70, generator=generator).clamp(-3, 3)
    x[M - 1, :outliers] = 20.0
    w_int8, w_scale = quantize_weight(torch.randn(140, 70, generator=generator))
    bias = poisoned(torch.randn(140, generator=generator).half())
    case = Case(poisoned(x.half()), [poisoned(w_int8)], [poisoned(w_scale)], [bias])
    assert check_product(case, extra_m=16, processors=processors, block_n=128) == tiles


def test_extended_tiles_are_the_best_guess_for_many_rows_on_sm_90_and_nothing_else():
    def chosen(M, N=4096, dtype=torch.float16, arch="sm_90"):
        return [config.extra_m for config in gemm_configs(arch, M, N, 4096, dtype, 132)]

    assert chosen(1025) == chosen(4096, dtype=torch.bfloat16) == [0, 0, 64]
    others = [
        chosen(1024),
        chosen(4096, N=128),
        chosen(4096, N=50257),
        chosen(4096, dtype=torch.float32),
        *(chosen(4096, arch=arch) for arch in GEMM if arch != "sm_90"),
        *([config.extra_m for config in rows] for rows in EXPERTS.values()),
    ]
    assert not any(map(any, others))


@pytest.mark.parametrize("M", [1025, 1536, 3000, 4096, 8192])
@pytest.mark.parametrize("tiles_n", [1, 4, 16, 24, 112])
def test_no_processor_has_much_more_to_do_with_extended_tiles(M, tiles_n):
    """In halves of a plain tile: at most one more than with plain tiles alone."""
    extended, plain = product_tiles(M, tiles_n, 132, 128, 64)
    assert 192 * extended + 128 * plain >= M * tiles_n > 192 * extended + 128 * (plain - tiles_n)
    ends = [0] * 132
    for halves in [3] * extended + [2] * plain:
        heapq.heapreplace(ends, ends[0] + halves)
    alone = sum(product_tiles(M, tiles_n, 132, 128, 0))
    assert max(ends) <= 2 * -(-alone // 132) + 1


@THOROUGH
@given(
    cases(st.integers(1, MAX_M)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, THRESHOLD, math.inf]),
    st.booleans(),
)
def test_decode_of_rows(case, parts, threshold, sums):
    x_int8, x_scale, x_outlier, _ = quantize_reference(case.x.clone(), threshold, "token")
    residues, residue_scale = outlier_residues(x_outlier) if threshold else ([], x_scale)
    outputs = run_decode(
        case,
        parts,
        threshold,
        sums,
        x_int8=poisoned(x_int8),
        x_scale=poisoned(x_scale),
        residues=[poisoned(residue) for residue in residues],
        residue_scale=poisoned(residue_scale),
        QUANTIZE=False,
    )
    for y, expected in zip(outputs, case.expected("token", threshold), strict=True):
        assert relative_error(y, expected) < 2 * TOLERANCE[case.x.dtype]


@THOROUGH
@given(
    cases(st.integers(1, MAX_M)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([THRESHOLD, math.inf]),
    st.booleans(),
)
def test_decode_that_quantises(case, parts, threshold, sums):
    x_int8, x_scale, _, _ = quantize_reference(case.x.clone(), threshold, "column")
    made = {"x_int8": poisoned_like(x_int8), "x_scale": poisoned_like(x_scale)}
    made |= {"residues": [], "residue_scale": poisoned(x_scale)}
    outputs = run_decode(case, parts, threshold, sums, **made, QUANTIZE=True)
    assert torch.equal(made["x_int8"], x_int8)
    assert torch.equal(made["x_scale"], x_scale)
    for y, expected in zip(outputs, case.expected("column", threshold), strict=True):
        assert relative_error(y, expected) < 2 * TOLERANCE[case.x.dtype]


@pytest.mark.parametrize("last", [0, 2], ids="part {} last".format)
def test_whichever_part_comes_last_the_sum_is_the_same_bits(monkeypatch, last):
    """Programs of the interpreter run in the order of their numbers: these get others."""
    generator = torch.Generator().manual_seed(3)
    w_int8, w_scale = quantize_weight(torch.randn(40, 256, generator=generator))
    x = poisoned(torch.randn(3, 256, generator=generator))
    case = Case(x, [poisoned(w_int8)], [poisoned(w_scale)], [])

    def run() -> Tensor:
        x_int8, x_scale, _, _ = quantize_reference(x.clone(), math.inf, "token")
        rows = {"x_int8": poisoned(x_int8), "x_scale": poisoned(x_scale)}
        rows |= {"residues": [], "residue_scale": poisoned(x_scale), "QUANTIZE": False}
        (y,) = run_decode(case, 4, math.inf, sums=True, **rows)
        return y

    expected = run()
    order = [part for part in range(4) if part != last] + [last]
    grid = stock.interpreter_builder
    place = grid.set_grid_idx
    monkeypatch.setattr(grid, "set_grid_idx", lambda x, y, z: place(x, order[y], z))
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("decomposition", ["token", "column"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_come_out_of_decode_as_of_a_float_product(value, decomposition):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 40, generator=generator)
    x[1, [5, 8]] = torch.tensor([value, 9.0])
    w_int8, w_scale = quantize_weight(torch.randn(7, 40, generator=generator))
    case = Case(poisoned(x), [poisoned(w_int8)], [poisoned(w_scale)], [])
    quantizes = decomposition == "column"
    x_int8, x_scale, x_outlier, _ = quantize_reference(x, THRESHOLD, decomposition)
    residues, residue_scale = ([], x_scale) if quantizes else outlier_residues(x_outlier)
    (y,) = run_decode(
        case,
        1,
        THRESHOLD,
        x_int8=poisoned_like(x_int8) if quantizes else poisoned(x_int8),
        x_scale=poisoned_like(x_scale) if quantizes else poisoned(x_scale),
        residues=[poisoned(residue) for residue in residues],
        residue_scale=poisoned(residue_scale),
        QUANTIZE=quantizes,
    )
    (expected,) = case.expected(decomposition)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_residues_keep_23_bits_below_the_largest_outlier():
    x = 1000 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    residues, scale = outlier_residues(x)
    error = (residues_reference(residues, scale) - x).abs().amax(1) / x.abs().amax(1)
    assert (error < 2**-23).all(), error
    assert torch.equal(residues[0], torch.round(x / scale.unsqueeze(1)).to(torch.int8))
