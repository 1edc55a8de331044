"""Every kernel in every configuration of the tables, compiled for GPUs that are not here.

``benchmarks/gpu_kernels.py`` prints what is asserted here as a table.
"""

import re

import pytest
import triton

from int8fx.testing.gpuless import specimens
from int8fx.testing.nogpu import offline

FP16 = [
    pytest.param(specimen, id=str(specimen))
    for arch in offline.TARGETS
    for specimen in specimens.specimens(arch)
]
OTHER_DTYPES = [
    pytest.param(specimen, id=str(specimen))
    for arch, dtype in (("sm_90", "fp32"),)
    for specimen in specimens.specimens(arch, dtype)
]


# What triton 3.6 compiles, by the assembler of CUDA 12.8 where 3.9 has that of 12.9:
# a few numbers of a thread wait in memory while a loop runs, and one kernel takes more registers.
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
MOST_WAITING = 48  # bytes
ONE_BLOCK_LESS = {"quantise and gather (layer, bias), M = 4096, K = 4096, fp16 sm_120"}


@pytest.mark.parametrize("specimen", FP16 + OTHER_DTYPES)
def test_int8_mma_no_spills_and_enough_blocks(specimen):
    seen = specimen.inspection
    assert seen.spill_bytes <= (MOST_WAITING if IS_OLD else 0)
    # The body of an outer loop may read what waited. None is written there.
    assert all(loop.get("STL", 0) == 0 and loop.get("LDL", 0) <= 2 for loop in seen.loops)
    assert bool(seen.int8_mma) == specimen.multiplies
    blocks = specimen.blocks - (IS_OLD and str(specimen) in ONE_BLOCK_LESS)
    assert seen.blocks_per_multiprocessor >= blocks


# What int8 products are made of: wgmma needs 64 rows, so a tile of 16 runs IMMA everywhere.
@pytest.mark.parametrize(
    ("arch", "rows_64", "rows_16"),
    [
        ("sm_80", "IMMA", "IMMA"),
        ("sm_90", "IGMMA", "IMMA"),
        ("sm_100", "IMMA" if IS_OLD else "UTCIMMA", "IMMA"),
        ("sm_120", "IMMA", "IMMA"),
        ("gfx90a", "v_mfma_i32", "v_mfma_i32"),
        ("gfx942", "v_mfma_i32", "v_mfma_i32"),
    ],
)
def test_the_instruction_is_the_best_of_its_architecture(arch, rows_64, rows_16):
    for specimen in specimens.specimens(arch):
        instruction = rows_64 if specimen.constants.get("BLOCK_M", 16) >= 64 else rows_16
        names = specimen.inspection.int8_mma
        assert all(name.startswith(instruction) for name in names), (str(specimen), names)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_operands_arrive_by_asynchronous_copies(arch):
    """The loops over K, and the product's over gathered outliers: a plain load in one would stall every
    step. Another has plain loads: that over outlier columns beyond those that there is room for."""
    for specimen in filter(lambda one: one.multiplies, specimens.specimens(arch)):
        loops = [loop for loop in specimen.inspection.loops if any("MMA" in name for name in loop)]
        # These gather their outlier columns byte by byte, at the end.
        if specimen.constants.get("QUANTIZE") or specimen.label.startswith("experts"):
            loops = [loop for loop in loops if {"IMMA", "IGMMA"} & loop.keys()]
        if specimen.label.startswith("product"):
            plain = [loop for loop in loops if "LDGSTS" not in loop]
            loops = [loop for loop in loops if "LDGSTS" in loop]
            assert not any({"IMMA", "IGMMA"} & loop.keys() for loop in plain)
            # An extended tile has as many again; that over outliers has no registers to load ahead.
            is_extended = specimen.constants["EXTRA_M"] > 0
            assert (len(loops), len(plain)) == ((3, 3) if is_extended else (2, 1))
        else:
            assert len(loops) == 1
        for loop in loops:
            assert loop.get("LDGSTS", 0) > 0, str(specimen)
            # Of groups the loop reads scales, too, one number of a channel at a time.
            assert specimen.label.startswith("groups") or loop.get("LDG", 0) == 0, str(specimen)


(EXTENDED,) = (config for config in specimens.configs.GEMM["sm_90"] if config.extra_m)


@pytest.mark.parametrize(
    ("dtype", "constants"),
    [
        ("bf16", {}),
        ("bf16", {"HAS_BIAS": False}),
        ("fp16", {"HAS_OUTLIERS": False}),
        *(
            ("fp16", {"GROUPED": grouped, "HAS_BIAS": has_bias, "EVEN_K": even})
            for grouped in (True, False)
            for has_bias in (True, False)
            for even in (True, False)
        ),
    ],
    ids=str,
)
def test_sm_90_has_registers_for_both_accumulators_of_an_extended_tile(dtype, constants):
    """Whatever is asked of it: 192 of 255 registers are taken by the accumulators alone."""
    seen = specimens.gemm("sm_90", EXTENDED, dtype, **constants).inspection
    assert seen.spill_bytes == 0
    assert seen.blocks_per_multiprocessor == 1
    plain, extended = [loop["IGMMA"] for loop in seen.loops if "IGMMA" in loop]
    assert 2 * extended == 3 * plain


@pytest.mark.parametrize("config", specimens.configs.GEMM["sm_90"][2:], ids=str)
def test_no_int8_wgmma_of_sm_90_is_in_flight_from_step_to_step(config):
    """Why the model charges a block that is alone with a drained tensor core (``gpu_model.py``)."""
    ptx = specimens.gemm("sm_90", config, HAS_OUTLIERS=False).compiled().asm["ptx"]
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) == {"0"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_the_decode_loop_is_loads_and_products(arch):
    """At 5 bytes of weight or more for each instruction of a warp, memory is what takes the time."""
    for kind, rows in specimens.configs.DECODE[arch].items():
        for config in rows:
            seen = specimens.decode(arch, kind, config, "fp16").inspection  # compiled above
            (loop,) = [loop for loop in seen.loops if {"IMMA", "IGMMA"} & loop.keys()]
            instructions = sum(loop.values()) * config.num_warps
            assert config.block_n * config.block_k > 5 * instructions, (kind, config, loop)


@pytest.mark.parametrize("arch", offline.TARGETS)
def test_products_of_groups_are_matrix_instructions(arch):
    """Of rows in float as well, which hold none of int8."""
    for specimen in specimens.grouped_specimens(arch):
        assert specimen.inspection.mma, str(specimen)
