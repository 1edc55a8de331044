"""Files that are damaged, of another version, or made to do harm: an error that names the file and the
tensor or the option, and a model that is as it was."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import int8fx
from int8fx.errors import CheckpointError
from int8fx.testing import foreign_files

SAMPLES = foreign_files.samples()
N, K = 96, 128
# What a reader may do without.
OPTIONAL = {
    "g_idx", "input_scale", "output_scale", "packing", "view_as_float", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
}  # fmt: skip


def written(folder: Path, name: str) -> Path:
    return foreign_files.write(folder, {"up": SAMPLES[name](N, K)}, {"up.bias": torch.zeros(N)})


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"up": nn.Linear(K, N)}).requires_grad_(False)


def refused(folder: Path, *words: str) -> None:
    """The checkpoint is refused with these words, and the model stays what it was."""
    loaded = model()
    before = {
        name: (tensor, tensor.clone()) for name, tensor in loaded.state_dict(keep_vars=True).items()
    }
    with pytest.raises(CheckpointError) as error:
        int8fx.load_checkpoint(loaded, folder)
    for word in words:
        assert word in str(error.value), str(error.value)
    after = loaded.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, (tensor, _) in before.items())
    assert all(torch.equal(after[name], values) for name, (_, values) in before.items())
    assert type(loaded["up"].weight) is nn.Parameter


def change(folder: Path, entry: str, tensor: torch.Tensor | None) -> None:
    """Another tensor in the place of an entry, or none; the header's metadata stays."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    metadata = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    tensors = load_file(file)
    del tensors[f"up.{entry}"]
    if tensor is not None:
        tensors[f"up.{entry}"] = tensor.contiguous()
    save_file(tensors, file, metadata)


CASES = [(name, entry) for name, make in SAMPLES.items() for entry in make(N, K).tensors]
# Entries that nothing of the weight depends on, as long as they are there.
UNREAD = OPTIONAL - {"g_idx", "packing"}


def sample(name: str, entry: str) -> torch.Tensor:
    return SAMPLES[name](N, K).tensors[entry]


READ = [(name, entry) for name, entry in CASES if entry not in UNREAD]
# Numbers and texts have a value, and no shape to speak of.
SHAPED = [
    (name, entry)
    for name, entry in READ
    if sample(name, entry).dim()
    and not {"quant_state", "comfy_quant", "packing"} & set(entry.split("."))
]
FLOATS = [(name, entry) for name, entry in READ if sample(name, entry).is_floating_point()]


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_a_tensor_is_missing(name, entry, tmp_path):
    written(tmp_path, name)
    change(tmp_path, entry, None)
    if entry in OPTIONAL:
        int8fx.load_checkpoint(model(), tmp_path)
    else:
        refused(tmp_path, "up")


@pytest.mark.parametrize(("name", "entry"), SHAPED)
def test_a_tensor_is_of_another_shape(name, entry, tmp_path):
    written(tmp_path, name)
    tensor = sample(name, entry)
    change(tmp_path, entry, tensor.repeat(2, *[1] * (tensor.dim() - 1)))
    refused(tmp_path, "model.safetensors", f"up.{entry}".split(".weight")[0])


@pytest.mark.parametrize(("name", "entry"), READ)
def test_a_tensor_is_of_another_dtype(name, entry, tmp_path):
    written(tmp_path, name)
    tensor = sample(name, entry)
    change(tmp_path, entry, tensor.float().double())
    refused(tmp_path, "model.safetensors", f"up.{entry}", "float64")


@pytest.mark.parametrize(("name", "entry"), FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_is_not_finite(name, entry, value, tmp_path):
    written(tmp_path, name)
    tensor = sample(name, entry).clone()
    if tensor.element_size() == 1:
        value = float("nan")  # float8_e4m3fn has no infinity
    tensor.view(-1)[3 % tensor.numel()] = value
    change(tmp_path, entry, tensor)
    refused(tmp_path, f"up.{entry}", "finite")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_is_broken_off(name, tmp_path):
    file = written(tmp_path, name) / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 40, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(tmp_path, "model.safetensors", "broken off")


@pytest.mark.parametrize("name", ["gptq-act-order", "compressed-tensors-w4a16-act-order"])
@pytest.mark.parametrize("group", [-1, 1000])
def test_a_group_that_there_is_none_of(name, group, tmp_path):
    written(tmp_path, name)
    entry = "g_idx" if name.startswith("gptq") else "weight_g_idx"
    g_idx = SAMPLES[name](N, K).tensors[entry].clone()
    g_idx[5] = group
    change(tmp_path, entry, g_idx)
    refused(tmp_path, f"up.{entry}", "corrupt: a group outside of 0 to")


STATIC = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
}


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gptq-4-v1", {"bits": 5}, "bits = 5; read: 2, 3, 4, 8"),
        ("gptq-4-v1", {"bits": True}, "bits = True; read"),
        ("gptq-4-v1", {"checkpoint_format": "gptq_v3"}, "checkpoint_format = 'gptq_v3'; read"),
        ("gptq-4-v1", {"format": "gptq_v2"}, "checkpoint_format and format differ"),
        ("gptq-4-v1", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ("gptq-4-v1", {"group_size": 0}, "group_size = 0; allowed"),
        ("gptq-4-v1", {"group_size": "128"}, "group_size = '128'; allowed"),
        ("gptq-4-v1", {"pack_dtype": "int16"}, "pack_dtype = 'int16'; read"),
        ("gptq-4-v1", {"new_option": 1}, "new_option = 1: an option that is not known"),
        ("gptq-4-v1", {"dynamic": {"(": {}}}, "'(' is no pattern"),
        ("gptq-4-v1", {"dynamic": {"up": {"bits": 7}}}, "bits = 7; read"),
        ("gptq-4-v1", {"dynamic": {"up": {"zeros": 7}}}, "zeros = 7: an option that is not known"),
        ("gptq-4-v1", {"quant_method": "aqlm"}, "quant_method = 'aqlm'; read: gptq, awq"),
        ("awq-gemm", {"version": "gemv2"}, "version = gemv2; read: gemm, gemv, gemv_fast, llm-awq"),
        ("awq-gemm", {"bits": 8}, "bits = 8; read: 4"),
        ("awq-gemm", {"bits": None}, "bits"),
        ("nf4", {"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type = 'nf5'; read: 'nf4', 'fp4'"),
        ("eetq", {"weights": "int4"}, "weights = 'int4'; read: 'int8'"),
        ("compressed-tensors-w4a16", {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack"),
        ("compressed-tensors-w4a16", {"config_groups": {}}, "config_groups = {}"),
        ("compressed-tensors-w4a16", {"config_groups": {"a": {"targets": ["re:("]}}}, "no pattern"),
        (
            "compressed-tensors-w4a16",
            {"config_groups": {"a": {"targets": ["x"]}}},
            "no targets name up",
        ),
        ("compressed-tensors-w8a8", {"config_groups": {"a": STATIC}}, "dynamic = False; read: True"),
        ("compressed-tensors-w4a16", {"transform_config": {"R1": {}}}, "transform_config"),
        ("compressed-tensors-w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("fp8", {"weight_block_size": [128]}, "weight_block_size = [128]"),
        ("fp8", {"fmt": "e5m2"}, "fmt = 'e5m2'"),
        ("mxfp4", {"block": 16}, "block = 16: an option that is not known"),
    ],
)
def test_an_option_that_is_not_read(name, options, words, tmp_path):
    foreign_files.write(tmp_path, {"up": SAMPLES[name](N, K)}, {"up.bias": torch.zeros(N)}, **options)
    refused(tmp_path, str(tmp_path), words)


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("nf4", "weight.quant_state.bitsandbytes__nf4", "damaged"),
        ("comfyui", "comfy_quant", "damaged"),
        ("hqq-4-axis1", "packing", "8bit"),
        ("hqq-4-axis1", "nbits", "7"),
        ("hqq-4-axis1", "axis", "2; allowed: 0, 1"),
        ("hqq-4-axis1", "group_size", "does not divide"),
    ],
)
def test_a_setting_beside_the_weight(name, entry, words, tmp_path):
    written(tmp_path, name)
    values = {
        "packing": torch.tensor(list(b"8bit_u8"), dtype=torch.uint8),
        "nbits": torch.tensor(7, dtype=torch.int32),
        "axis": torch.tensor(2, dtype=torch.int32),
        "group_size": torch.tensor(7, dtype=torch.int32),
    }
    change(tmp_path, entry, values.get(entry, torch.tensor(list(b"{"), dtype=torch.uint8)))
    refused(tmp_path, f"up.{entry}", words)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_type": "fp4"}, "quant_type = 'fp4'"),
        ({"blocksize": 3}, "blocksize = 3"),
        ({"shape": [N, K, 1]}, "shape"),
        ({"shape": [N, K * 2]}, "bytes"),
        ({"version": 2}, "unknown: version"),
    ],
)
def test_bitsandbytes_state(said, words, tmp_path):
    written(tmp_path, "nf4")
    entry = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(SAMPLES["nf4"](N, K).tensors[entry].tolist()))
    text = json.dumps(state | said).encode()
    change(tmp_path, entry, torch.tensor(list(text), dtype=torch.uint8))
    refused(tmp_path, "up.", words)


def test_a_codebook_of_its_own_is_not_guessed(tmp_path):
    written(tmp_path, "nf4")
    change(tmp_path, "weight.quant_map", torch.linspace(-1, 1, 16))
    refused(tmp_path, "up.weight: a codebook of its own")


def test_gptq_without_its_configuration(tmp_path):
    written(tmp_path, "gptq-4-v1")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "up.qweight is of GPTQ or AWQ", "no config.json or quantize_config.json")


def test_a_torchao_weight_that_the_header_does_not_describe(tmp_path):
    foreign = SAMPLES["torchao-intx-4"](N, K)
    foreign.metadata["PATH.weight"] = json.dumps({"_type": "Float8Tensor", "_data": {}})  # type: ignore[index]
    foreign_files.write(tmp_path, {"up": foreign}, {"up.bias": torch.zeros(N)})
    refused(tmp_path, "up._weight_qdata: a Float8Tensor; read: IntxUnpackedToInt8Tensor")


# --- what would do harm ----------------------------------------------------------------------------


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_is_not_opened(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Harm()))
    refused(file, f"model{suffix}: a pickle, which can run code")
    assert not (tmp_path / "harm").exists()


def test_nothing_outside_of_the_folder_is_read(tmp_path):
    written(tmp_path / "outside", "gptq-4-v1")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "outside" / "config.json").read_text())
    index = {"weight_map": {"up.qweight": "../outside/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.safetensors.index.json", "up.qweight", "a file outside its folder")


@pytest.mark.parametrize("text", ["{", "[]", '{"quantization_config": 1}'])
def test_a_configuration_that_is_none(text, tmp_path):
    written(tmp_path, "gptq-4-v1")
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, str(tmp_path))


def test_a_header_with_a_size_beyond_its_file(tmp_path):
    file = written(tmp_path, "gptq-4-v1") / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[:8] = struct.pack("<Q", 1 << 60)
    file.write_bytes(raw)
    refused(tmp_path, "model.safetensors", "broken off in its header")
