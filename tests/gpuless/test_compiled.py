"""Every kernel in every configuration of the tables, compiled for GPUs that are not here.

``benchmarks/gpu_kernels.py`` prints what is asserted here as a table.
"""

import pytest
import specimens
from nogpu import offline, sass

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


@pytest.mark.parametrize("specimen", FP16 + OTHER_DTYPES)
def test_int8_mma_no_spills_and_enough_blocks(specimen):
    seen = sass.inspect(specimen.compile())
    assert seen.spill_bytes == 0
    assert bool(seen.int8_mma) == specimen.multiplies
    assert seen.blocks_per_multiprocessor >= specimen.blocks


# What int8 products are made of: wgmma needs 64 rows, so a decode tile of 16 runs IMMA everywhere.
@pytest.mark.parametrize(
    ("arch", "product", "decode"),
    [
        ("sm_80", "IMMA", "IMMA"),
        ("sm_90", "IGMMA", "IMMA"),
        ("sm_100", "UTCIMMA", "IMMA"),
        ("sm_120", "IMMA", "IMMA"),
        ("gfx90a", "v_mfma_i32", "v_mfma_i32"),
        ("gfx942", "v_mfma_i32", "v_mfma_i32"),
    ],
)
def test_the_instruction_is_the_best_of_its_architecture(arch, product, decode):
    all_specimens = {specimen.label.split()[0]: specimen for specimen in specimens.specimens(arch)}
    for kernel, instruction in (("product", product), ("decode", decode)):
        seen = sass.inspect(all_specimens[kernel].compile())
        assert all(name.startswith(instruction) for name in seen.int8_mma), seen.mma


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_operands_arrive_by_asynchronous_copies(arch):
    """Both loops of the product: a plain load in one would stall it at every step."""
    for config in specimens.configs.GEMM[arch]:
        seen = sass.inspect(specimens.gemm(arch, config).compile())
        loops = [loop for loop in seen.loops if any("MMA" in name for name in loop)]
        assert len(loops) == 2
        for loop in loops:
            assert loop.get("LDGSTS", 0) > 0
            assert loop.get("LDG", 0) == 0
