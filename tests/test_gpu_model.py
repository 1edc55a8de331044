"""benchmarks/gpu_model.py: what a modelled time is made of."""

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("triton")

import gpu_model
import gpu_modelled
from gpu_day import acceptance
from gpu_day.shapes import LAYERS

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.gather import launch_shape
from int8fx.testing.gpuless import specimens
from int8fx.testing.nogpu import sass

H100 = gpu_model.GPUS[0]


def norms() -> gpu_modelled.NormKernels:
    """Inductor's norms as if compiled: 15 instructions an element."""
    row = {kind: dict.fromkeys((4096, 14336), (120, 16)) for kind in gpu_model.MOVES}
    return {gpu.arch: row for gpu in gpu_model.GPUS}


def test_the_page_says_what_a_gpu_has_to_show():
    page = gpu_modelled.PAGE.read_text()
    assert page.startswith("# LLM.int8() on a GPU: a model, not a measurement")
    assert acceptance.page() in page


@pytest.mark.parametrize("mma", ["IGMMA", "IMMA"])
def test_a_block_alone_drains_the_tensor_cores_at_each_step(mma):
    """Of int8 WGMMA none is in flight from step to step; two blocks fill each other's gaps."""
    config = configs.GemmConfig(128, 128, 128, 8, 3)
    loop = {mma: 8, "LDGSTS": 8}
    two = sass.Inspection(90, 256, 128, 0, 96 << 10, {f"{mma}.64x128x32.S8": 8}, loop, [loop])
    one = dataclasses.replace(two, registers=168)
    assert (one.blocks_per_multiprocessor, two.blocks_per_multiprocessor) == (1, 2)

    def cycles(seen: sass.Inspection, M: int) -> float:
        # So fast a memory, that the tensor cores are the limit.
        fast = dataclasses.replace(H100, l2=1e15, dram=1e15, port=1024)
        found = gpu_model.product(fast, config, seen, M, 128 * H100.processors, 4096, 0)
        assert found.limit == "tensor cores"
        return (found.seconds - H100.gap) * H100.clock * 1e9

    step = 2 * 128 * 128 * 128 / (H100.int8 * gpu_model.TENSOR_SHARE)
    drained = gpu_model.DRAIN_CYCLES if mma == "IGMMA" else 0
    tiles = 2  # of each processor
    assert cycles(one, 256) == pytest.approx(tiles * (32 * (step + drained) + gpu_model.TILE_CYCLES))
    assert cycles(two, 256) == pytest.approx(tiles * (32 * step + gpu_model.TILE_CYCLES))
    # A single tile of each processor is alone, however many there is room for.
    assert cycles(two, 128) == pytest.approx(32 * (step + drained) + gpu_model.TILE_CYCLES)


def test_a_norm_is_limited_by_memory_or_by_its_instructions():
    memory = gpu_model.norm(H100, 4096, 4096, "fp16", 100, 16)
    assert memory.limit == "memory"
    assert memory.seconds == gpu_model.streaming(H100, 4 * 4096 * 4096)
    issue, twice = (gpu_model.norm(H100, 4096, 4096, "fp16", n, 16) for n in (1000, 2000))
    assert issue.limit == twice.limit == "issue"
    assert twice.seconds - H100.gap == pytest.approx(2 * (issue.seconds - H100.gap))


def gathering(M, K, N, quantizes=True):
    kernels = (specimens.quantize_gather("sm_90", M, K, "fp16", also, N) for also in (False, True))
    gathers, both = (kernel.inspection for kernel in kernels)
    return gathers, both if quantizes else None, launch_shape(M, K, N, torch.float16)


def test_a_norm_of_ours_is_counted_as_compiled():
    ours = specimens.norm("sm_90", 4096, "fp16", "rms", quantizes=False, adds=False)
    issued = gpu_model.instructions(ours.inspection), ours.num_warps
    expected = gpu_model.norm(H100, 4096, 4096, "column", *issued)
    assert gpu_modelled.Modelled(H100).norm(4096, 4096, "column") == expected


def test_later_steps_of_a_program_are_counted_with_their_loads():
    gathers, both, shape = gathering(4096, 4096, 4096)
    assert shape["STEPS"] == 4
    *_, once = gpu_model.gather_instructions(gathers, both, shape | {"STEPS": 1}, 4096, 32)
    *_, all_four = gpu_model.gather_instructions(gathers, both, shape, 4096, 32)
    assert 2 * once < all_four < 4 * once  # which columns are outliers is asked once


def test_what_gathers_is_its_loops_as_often_as_they_run():
    count = functools.partial(gpu_model.gather_instructions, *gathering(128, 4096, 4096))
    of_w, of_x, of_rows = count(4096, 32)
    wider, more = count(8192, 32), count(4096, 64)
    assert 500 < of_x <= of_w < 2000 and 500 < of_rows < 2000
    assert wider[0] - of_w == wider[1] - of_x > 200  # the list
    assert more[0] - of_w >= more[1] - of_x > 0
    assert wider[2] == more[2] == of_rows  # a row is one block, and lists nothing
    alone = gpu_model.gather_instructions(*gathering(128, 4096, 4096, False), 4096, 32)
    assert alone == (of_w, of_x, 0)


def test_programs_that_share_a_processor_take_longer_than_those_that_do_not():
    gathers, both, shape = gathering(128, 4096, 4096)

    def seconds(gpu_, *operands):
        return gpu_model.quantize_gather(gpu_, *operands, shape, 128, [4096], 4096, 0).seconds

    # 64 programs quantise, 66 gather; without outliers it is not memory that takes the time.
    each_its_own, more, half = (
        seconds(dataclasses.replace(H100, processors=n, dram=1e15), gathers, both)
        for n in (130, 1000, 65)
    )
    assert half > each_its_own == more


def test_parts_of_a_product_share_its_work_and_pay_for_the_sum():
    config = specimens.configs.GEMM["sm_90"][2]
    seen = specimens.gemm("sm_90", config).inspection

    def time(parts, K):
        split = dataclasses.replace(config, parts=parts)
        return gpu_model.product(H100, split, seen, 128, 4096, K, 32)

    assert time(2, 14336).seconds < time(1, 14336).seconds
    assert time(2, 512).seconds > time(1, 512).seconds


@pytest.mark.parametrize(
    ("programs", "cycles", "busiest"),
    [
        ([4], [2], 4),
        ([5], [2], 6),
        ([2, 2], [3, 2], 5),
        ([3, 2], [3, 2], 7),  # an extended one is last; plain ones follow on the other processor
        ([1, 2], [3, 2], 4),
    ],
)
def test_programs_are_dealt_out_in_order_and_the_busiest_processor_counts(programs, cycles, busiest):
    two = dataclasses.replace(H100, processors=2)
    assert gpu_model.busiest(two, 1, programs, cycles) == busiest


def test_blocks_of_one_kind_share_a_processor():
    two = dataclasses.replace(H100, processors=2)
    assert gpu_model.busiest(two, 2, [2], [3]) == 3
    assert gpu_model.busiest(two, 2, [4], [3]) == 6
    with pytest.raises(ValueError, match="one at a time"):
        gpu_model.busiest(two, 2, [2, 2], [3, 2])


def tiles_of_both_heights():
    *_, plain, extended = specimens.configs.GEMM["sm_90"]
    assert (plain.extra_m, extended.extra_m) == (0, 64)
    return [(config, specimens.gemm("sm_90", config).inspection) for config in (plain, extended)]


@pytest.mark.parametrize(
    ("M", "N", "tiles"),
    [
        (4096, 4096, (256, 128)),  # 8 halves for each of 132 processors: two extended tiles, one plain
        (4096, 6144, (504, 24)),
        (1536, 4096, (128, 0)),
        (2048, 4096, (0, 256)),  # four halves are two plain tiles
    ],
)
def test_extended_tiles_read_less_and_keep_no_processor_longer(M, N, tiles):
    (plain, seen_plain), (extended, seen_extended) = tiles_of_both_heights()
    assert specimens.configs.product_tiles(M, N // 256, 132, 128, 64) == tiles
    kinds = gpu_model.tile_kinds(H100, extended, seen_extended, M, N, 32)
    assert sum(kind.programs * kind.rows for kind in kinds) >= M * N // 256
    # With no limit but L2, and then none but the processors.
    alone = dataclasses.replace(H100, int8=10**9, fp16=10**9, dram=1e18, port=10**9, issue=10**9)
    for gpu_ in (dataclasses.replace(alone, l2=1e9), dataclasses.replace(H100, l2=1e18)):
        times = [
            gpu_model.product(gpu_, config, seen, M, N, 4096, 32).seconds
            for config, seen in ((plain, seen_plain), (extended, seen_extended))
        ]
        assert times[1] <= 1.01 * times[0], times
    rows = sum(kind.programs * (kind.rows + 256) for kind in kinds)
    l2 = gpu_model.product(dataclasses.replace(alone, l2=1e9), extended, seen_extended, M, N, 4096, 32)
    assert l2.limit == "L2"
    assert l2.seconds - H100.gap == pytest.approx(rows * 4096 / 1e9)


def test_an_extended_tile_waits_for_each_block_of_outliers_after_the_first():
    _, (extended, seen) = tiles_of_both_heights()
    few, more = (gpu_model.tile_kinds(H100, extended, seen, 4096, 4096, count) for count in (32, 70))
    assert [kind.waits for kind in few] == [0, 0]
    assert [kind.waits for kind in more] == [2, 0]
    assert few[0].instructions > few[1].instructions > 50


def test_no_product_is_faster_than_the_perfect_one():
    """The tables of where the time goes, for a product that takes twice the time of a perfect one."""

    def slow(gpu, M, N, K):
        return gpu_model.Time(2 * gpu_model.matmul_int8(gpu, M, N, K), "L2"), "128x256"

    modelled = gpu_modelled.Modelled(H100, slow, norms)
    rows = [row.strip("| ").split(" | ") for row in modelled.floors(4096)]
    assert [name for name, *_ in rows] == [layer.name for layer in LAYERS]
    for _, *ratios in rows:
        column, token, none, perfect = map(float, ratios)
        assert column < perfect < 2 * column
        assert max(column, token) < none
    parts = [row.strip("| ").split(" | ") for row in modelled.launches(4096)]
    assert [(name, way) for name, way, *_ in parts] == [
        (layer.name, way) for layer in LAYERS for way in ("column", "token")
    ]
    for (name, way, *times), layer in zip(parts[::2], LAYERS, strict=True):
        seconds = sum(float(time.split(",")[0]) for time in times)
        fastest = modelled.fastest(4096, layer, way)
        assert seconds == pytest.approx(1e6 * fastest.seconds, abs=0.2), name
