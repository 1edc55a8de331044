"""Each layout is read as its published description says: against writers that share nothing with the
readers (``int8fx/testing/foreign_files.py``), at shapes that are no round numbers, too."""

import pytest
import torch

from int8fx.testing import foreign_files
from int8fx.testing.foreign_files import Foreign, numbers
from int8fx.weights.readers import table
from int8fx.weights.readers.loading import Checkpoint
from int8fx.weights.readers.neutral import Grouped, Rotated, Values
from int8fx.weights.readers.opening import opened

SAMPLES = foreign_files.samples()
PATH = "model.layers.0.mlp.up_proj"


def checkpoint(folder, foreign: Foreign) -> Checkpoint:
    foreign_files.write(folder, {PATH: foreign}, {})
    container = opened(folder)
    reader = table.reader_of(container)
    assert reader is not None
    return Checkpoint.of(container, reader)


def read(folder, foreign: Foreign):
    return checkpoint(folder, foreign).read(PATH, tuple(foreign.w_hat.shape))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_weight_is_what_its_writer_meant(name, tmp_path):
    foreign = SAMPLES[name](96, 128)
    neutral = read(tmp_path, foreign)
    assert neutral.shape == (96, 128)
    if isinstance(neutral, Rotated):
        # A rotation in fp32, of 64 terms.
        bound = 7 * 2**-24 * 8 * foreign.w_hat.abs().amax()
        assert (neutral.dequantized().double() - foreign.w_hat).abs().max() <= bound
    elif isinstance(neutral, Values):
        assert torch.equal(neutral.dequantized(), foreign.w_hat.float())
    else:
        assert torch.equal(neutral.dequantized(torch.float64), foreign.w_hat)


@pytest.mark.parametrize(("N", "K", "group"), [(40, 72, 24), (8, 200, 64), (72, 96, 128)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_at_odd_shapes(bits, N, K, group, tmp_path):
    """K that no word or group divides: the last group is shorter."""
    foreign = foreign_files.gptq(numbers(N, K, bits, min(group, K)), bits, group)
    assert torch.equal(read(tmp_path, foreign).dequantized(torch.float64), foreign.w_hat)


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_in_the_order_of_activations(bits, version, group, tmp_path):
    given = numbers(64, 128, bits, group, act_order=True)
    neutral = read(tmp_path, foreign_files.gptq(given, bits, group, version=version))
    assert torch.equal(neutral.g_idx, given.g_idx)
    assert torch.equal(neutral.dequantized(torch.float64), given.w_hat)


def test_groups_in_their_order_need_no_index(tmp_path):
    assert read(tmp_path, SAMPLES["gptq-4-v1"](64, 128)).g_idx is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_restores_what_was_borrowed_from_the_next_field(bits, tmp_path):
    """gptqmodel subtracts version 1's one from whole words, so a zero point of 0 borrows."""
    given = numbers(64, 64, bits, 32)
    given.zero_point[::3] = 0
    foreign = foreign_files.gptq(given, bits, 32, version=2)
    ones = sum(1 << start for start in range(0, 32, bits))
    stored = foreign.tensors["qzeros"].long() - ones
    foreign.tensors["qzeros"] = stored.to(torch.int32)
    foreign.config["checkpoint_format"] = "gptq"  # type: ignore[index]
    assert torch.equal(read(tmp_path, foreign).dequantized(torch.float64), given.w_hat)


def test_gptq_takes_each_module_by_its_rule(tmp_path):
    rules = {r".*up_proj": {"bits": 8, "group_size": 64}, r"-:.*down_proj": {}, r".*": {"bits": 2}}
    given = numbers(64, 128, 8, 64)
    foreign = foreign_files.gptq(given, 8, 64)
    foreign_files.write(tmp_path, {PATH: foreign}, {}, dynamic=rules, bits=4, group_size=32)
    container = opened(tmp_path)
    found = Checkpoint.of(container, table.reader_of(container)).read(PATH)
    assert (found.bits, found.group) == (8, 64)
    assert torch.equal(found.dequantized(torch.float64), given.w_hat)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize(("K", "group"), [(128, 128), (320, 64), (192, 32), (1088, 64)])
def test_awq_has_room_for_more_groups_than_there_are(layout, K, group, tmp_path):
    make = getattr(foreign_files, f"awq_{layout}")
    foreign = make(numbers(32, K, 4, group), group)
    assert torch.equal(read(tmp_path, foreign).dequantized(torch.float64), foreign.w_hat)


@pytest.mark.parametrize("K", [96, 100, 40])
@pytest.mark.parametrize("N", [3, 24])
def test_bitsandbytes_blocks_run_over_the_ends_of_rows(N, K, tmp_path):
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    codebook = torch.linspace(-1, 1, 16)
    absmax = torch.rand(-(-N * K // 64)) + 0.5
    foreign = foreign_files.bitsandbytes(codes, codebook, absmax, "nf4", 64)
    assert torch.equal(read(tmp_path, foreign).dequantized().double(), foreign.w_hat)


def test_bitsandbytes_bytes_under_another_dtype(tmp_path):
    foreign = SAMPLES["nf4"](64, 64)
    foreign.tensors["weight"] = foreign.tensors["weight"].flatten().view(torch.bfloat16)
    assert torch.equal(read(tmp_path, foreign).dequantized().double(), foreign.w_hat)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("N", "K", "group"), [(48, 80, 16), (64, 24, 8)])
def test_hqq_at_each_number_of_bits(bits, axis, N, K, group, tmp_path):
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    count = N * K // group
    scale, zero = torch.rand(count).half(), (torch.rand(count) * 2**bits).half()
    foreign = foreign_files.hqq(codes, scale, zero, bits, group, axis)
    neutral = read(tmp_path, foreign)
    assert isinstance(neutral, Grouped) and neutral.transposed == (axis == 0)
    assert torch.equal(neutral.dequantized(torch.float64), foreign.w_hat)


def test_hqq_bytes_under_a_float_dtype(tmp_path):
    foreign = SAMPLES["hqq-4-axis1"](64, 64)
    foreign.tensors["W_q"] = foreign.tensors["W_q"].view(torch.float16)
    foreign.tensors["view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    assert torch.equal(read(tmp_path, foreign).dequantized(torch.float64), foreign.w_hat)


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_of_rows_that_no_byte_divides(bits, tmp_path):
    codes = torch.randint(0, 2**bits, (5, 96), dtype=torch.uint8)
    foreign = foreign_files.quanto(codes, torch.rand(5, 3), torch.rand(5, 3), bits)
    assert torch.equal(read(tmp_path, foreign).dequantized(torch.float64), foreign.w_hat)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_streams_cross_words(bits, tmp_path):
    given = numbers(24, 80, bits, 16) if bits > 1 else numbers(24, 80, 1, 16)
    foreign = foreign_files.compressed_tensors(given, bits, 16, symmetric=False)
    assert torch.equal(read(tmp_path, foreign).dequantized(torch.float64), foreign.w_hat)


def test_compressed_tensors_takes_the_most_specific_group(tmp_path):
    foreign = SAMPLES["compressed-tensors-w8a16"](64, 128)
    narrow = SAMPLES["compressed-tensors-w4a16"](64, 128).config["config_groups"]["group_0"]
    own = dict(foreign.config["config_groups"]["group_0"], targets=["re:.*up_proj"])
    groups = {"a": narrow, "b": own}
    foreign_files.write(tmp_path, {PATH: foreign}, {}, config_groups=groups)
    container = opened(tmp_path)
    found = Checkpoint.of(container, table.reader_of(container)).read(PATH)
    assert found.bits == 8


@pytest.mark.parametrize("scalar", [True, False])
def test_fp8_with_one_scale_or_one_a_row(scalar, tmp_path):
    weight = torch.randn(24, 40).to(torch.float8_e4m3fn)
    scale = torch.rand(1, 1) if scalar else torch.rand(24, 1)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    w_hat = weight.double() * scale.double()
    foreign = Foreign({"weight": weight, "weight_scale_inv": scale}, w_hat, config)
    assert torch.equal(read(tmp_path, foreign).dequantized(), w_hat.float())
