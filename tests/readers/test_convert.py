"""``int8fx convert`` and ``int8fx inspect``: from one format to another, and what a file holds."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import int8fx
import int8fx.cli.app
from int8fx.errors import CheckpointError
from int8fx.testing import foreign_files
from int8fx.weights.readers import as_compressed_tensors, table
from int8fx.weights.readers.converting import convert
from int8fx.weights.readers.inspecting import Contents, Kind, inspect
from int8fx.weights.readers.loading import Checkpoint
from int8fx.weights.readers.opening import opened
from int8fx.weights.readers.unpacking import pack, unpack

SAMPLES = foreign_files.samples()
N, K = 96, 128
EXACT = [
    name
    for name in SAMPLES
    if name.startswith(
        ("gptq", "compressed", "eetq", "comfyui", "torchao-intx", "torchao-int8", "mxfp4")
    )
    or name in ("awq-gemm", "awq-gemv", "quanto-4-integer", "quanto-8")
]
EXACT.remove("comfyui-convrot")


def written(folder, name: str, count: int = 1):
    modules = {f"layers.{index}": SAMPLES[name](N, K) for index in range(count)}
    plain = {f"layers.{index}.bias": torch.arange(N).float() for index in range(count)}
    config = {"model_type": "toy", "num_hidden_layers": count}
    return foreign_files.write(folder, modules, plain, config), modules["layers.0"]


def model(count: int = 1) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(K, N) for _ in range(count))}
    ).requires_grad_(False)


def shape_of(name: str):
    return (N, K) if name.startswith("quanto") else None


def read(folder):
    container = opened(folder)
    return Checkpoint.of(container, table.reader_of(container)).read("layers.0")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 64])
def test_pack_is_the_inverse_of_unpack(bits, count):
    integers = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8)
    packed = pack(integers, bits)
    assert torch.equal(packed, foreign_files.streams(integers, bits))
    assert torch.equal(unpack(packed, bits, count), integers)


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith("quanto")])
def test_to_compressed_tensors_and_back(name, tmp_path):
    folder, foreign = written(tmp_path / "theirs", name)
    convert(folder, tmp_path / "converted", "compressed-tensors")
    found = read(tmp_path / "converted")
    assert torch.equal(found.dequantized(torch.float64), foreign.w_hat)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["model_type"] == "toy"
    loaded = int8fx.load_checkpoint(model(), tmp_path / "converted")
    assert torch.equal(loaded["layers"][0].weight.dequantize(), foreign.w_hat.float())
    assert torch.equal(loaded["layers"][0].bias, torch.arange(N).float())


# Not act-order: the owner's later releases read no groups by order.
@pytest.mark.parametrize("name", ["gptq-4-v1", "gptq-8-v2", "eetq", "awq-gemm"])
def test_what_is_converted_is_read_by_its_owner(name, tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    folder, foreign = written(tmp_path / "theirs", name)
    convert(folder, tmp_path / "converted", "compressed-tensors")
    container = opened(tmp_path / "converted")
    config = table.config_of(container).values
    scheme = quantization.QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    names = Checkpoint.of(container, table.named("compressed-tensors")).modules["layers.0"]
    state = {entry: container.tensor(full) for entry, full in names.items()}
    theirs = BaseCompressor.get_value_from_registry(config["format"]).decompress(state, scheme)[
        "weight"
    ]
    assert torch.equal(theirs, foreign.w_hat.to(theirs.dtype))


@pytest.mark.parametrize("name", ["nf4", "awq-gemv-fast", "hqq-4-axis1", "hqq-4-axis0", "torchao-int4"])
def test_what_compressed_tensors_cannot_hold(name, tmp_path):
    folder, _ = written(tmp_path / "theirs", name)
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight: .* cannot hold exactly"):
        convert(folder, tmp_path / "converted", "compressed-tensors")
    assert not (tmp_path / "converted").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    "name", [name for name in SAMPLES if name != "fp8" and not name.startswith(("quanto", "hqq-"))]
)
def test_to_int8fx(name, tmp_path):
    folder, _ = written(tmp_path / "theirs", name)
    loaded = int8fx.load_checkpoint(model(), folder)
    convert(folder, tmp_path / "converted", "int8fx")
    again = int8fx.load_checkpoint(int8fx.load_checkpoint(model(), folder), tmp_path / "converted")
    assert torch.equal(again["layers"][0].weight.dequantize(), loaded["layers"][0].weight.dequantize())
    options = json.loads((tmp_path / "converted" / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "int8fx", **loaded["layers"][0].weight.options}
    expected.pop("columns", None)
    assert options == expected


@pytest.mark.parametrize("name", ["hqq-4-axis1", "hqq-3-axis1"])
def test_to_int8fx_with_zero_points_in_float(name, tmp_path):
    folder, foreign = written(tmp_path / "theirs", name)
    convert(folder, tmp_path / "converted", "int8fx")
    again = int8fx.load_checkpoint(int8fx.load_checkpoint(model(), folder), tmp_path / "converted")
    assert torch.equal(again["layers"][0].weight.dequantize(), foreign.w_hat.float())


def test_groups_of_rows_have_no_configuration(tmp_path):
    folder, _ = written(tmp_path / "theirs", "hqq-4-axis0")
    with pytest.raises(CheckpointError, match=r"layers\.0: groups of rows, .* cannot name"):
        convert(folder, tmp_path / "converted", "int8fx")


def test_to_int8_by_channel(tmp_path):
    folder, foreign = written(tmp_path / "theirs", "awq-gemm")
    convert(folder, tmp_path / "converted", "int8")
    loaded = int8fx.load_checkpoint(int8fx.quantize_(model()), tmp_path / "converted")
    weight = loaded["layers"][0].weight
    error = (weight.dequantize() - foreign.w_hat.float()).abs()
    assert (error.amax(1) <= foreign.w_hat.abs().amax(1) / 127 / 2 * 1.001).all()


def test_shards_of_a_size(tmp_path):
    folder, foreign = written(tmp_path / "theirs", "gptq-4-v1", count=4)
    seen = []
    converted = convert(
        folder,
        tmp_path / "converted",
        "compressed-tensors",
        update=lambda done, total: seen.append((done, total)),
        largest=20_000,
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and converted.modules == 4
    shards = sorted(path.name for path in (tmp_path / "converted").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    loaded = int8fx.load_checkpoint(model(4), tmp_path / "converted")
    assert torch.equal(loaded["layers"][3].weight.dequantize(), foreign.w_hat.float())


def test_tokenizers_come_along_and_weights_do_not(tmp_path):
    folder, _ = written(tmp_path / "theirs", "gptq-4-v1")
    for name in ("tokenizer.json", "tokenizer.model", "quantize_config.json", "notes.md"):
        (folder / name).write_text("{}")
    convert(folder, tmp_path / "converted", "compressed-tensors")
    found = {path.name for path in (tmp_path / "converted").iterdir()}
    assert found == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"}


def test_modules_of_several_kinds(tmp_path):
    modules = {"a": SAMPLES["gptq-4-v1"](N, K), "b": SAMPLES["gptq-8-v1"](N, K)}
    rules = {"b": {"bits": 8}}
    folder = foreign_files.write(tmp_path / "theirs", modules, {}, dynamic=rules)
    convert(folder, tmp_path / "converted", "compressed-tensors")
    loaded = nn.ModuleDict({name: nn.Linear(K, N, bias=False) for name in "ab"}).requires_grad_(False)
    int8fx.load_checkpoint(loaded, tmp_path / "converted")
    for name, foreign in modules.items():
        assert torch.equal(loaded[name].weight.dequantize(), foreign.w_hat.float())
    with pytest.raises(CheckpointError, match=r"b: .* int8fx's configuration has one setting for all"):
        convert(folder, tmp_path / "ours", "int8fx")


def test_neither_a_float_checkpoint_nor_ours(tmp_path):
    int8fx.save_checkpoint(model(), tmp_path / "float")
    with pytest.raises(CheckpointError, match="no weights of another system; int8fx quantize"):
        convert(tmp_path / "float", tmp_path / "out", "int8fx")


def test_unsigned_codes_without_a_zero_point_are_counted_from_0():
    from int8fx.weights.readers.neutral import Grouped

    codes = torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    _, group = as_compressed_tensors.entries(Grouped(codes, torch.ones(4, 2), 16, 4), "w")
    assert group["weights"]["symmetric"] is False


# --- inspect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gptq-4-v1", ("GPTQ", 4, 32, "zero points", "w4a16-group")),
        ("gptq-act-order", ("GPTQ", 4, 16, "zero points, act-order", "w4a16-group")),
        ("gptq-channel", ("GPTQ", 4, None, "zero points", "w4a16-group")),
        ("gptq-3-v2", ("GPTQ", 3, 32, "zero points", "wna16-group")),
        ("nf4", ("bitsandbytes", 4, 64, "codebook", "nf4")),
        ("eetq", ("EETQ", 8, None, "symmetric", "w8a16")),
        ("hqq-4-axis0", ("HQQ", 4, 16, "zero points in float, groups of rows", "wna16-rows")),
        ("quanto-4", ("quanto", 4, 32, "offsets", "w4a16-group")),
        ("compressed-tensors-w8a8", ("compressed-tensors", 8, None, "symmetric", "absmax-vector")),
        ("comfyui-convrot", ("ComfyUI", 8, None, "rotated", "int8-rotated")),
        ("fp8", ("FP8", 8, None, "values", "llm.int8")),
    ],
)
def test_inspect_tells_what_is_there(name, expected, tmp_path):
    folder, foreign = written(tmp_path, name, count=3)
    contents = inspect(folder)
    (kind,) = contents.kinds
    assert (contents.format, kind.bits, kind.group, kind.details, kind.scheme) == expected
    assert kind.modules == 3 and kind.example == "layers.0"
    assert kind.bytes == 3 * sum(tensor.nbytes for tensor in foreign.tensors.values())
    assert contents.floats == (3, 3 * N * 4)
    assert contents.files == (1, (folder / "model.safetensors").stat().st_size)


def test_inspect_of_ours_and_of_float(tmp_path):
    int8fx.save_checkpoint(model(2), tmp_path / "float")
    assert inspect(tmp_path / "float").format == "float"
    quantized = int8fx.quantize_(model(2), scheme="w4a16-group", group_size=32)
    int8fx.save_checkpoint(quantized, tmp_path / "ours")
    contents = inspect(tmp_path / "ours")
    (kind,) = contents.kinds
    found = (contents.format, kind.bits, kind.group, kind.scheme, kind.modules)
    assert found == ("int8fx", 4, 32, "w4a16-group", 2)
    assert contents.floats == (2, 2 * N * 4)


def test_what_inspect_prints_fits_80_columns_with_the_whole_path_of_a_module(tmp_path):
    path = "model.decoder.layers.0.self_attention.output_projection"
    kind = Kind(8, None, "symmetric", "int8 per channel", 30, path, 2**25)
    contents = Contents("folder", "int8fx", {"scheme": "llm.int8"}, [kind], (62, 2**27), (1, 2**28))
    console = Console(file=io.StringIO(), width=80)
    console.print(contents)
    first, *lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    assert first == "folder: int8fx, scheme llm.int8; 1 file, 256.0 MiB"
    assert max(map(len, lines)) <= 80
    at = lines[0].index("example")
    assert "".join(line[at:] for line in lines[1:]) == path


def test_what_inspect_prints_breaks_a_path_behind_a_dot():
    kind = Kind(8, None, "symmetric", "int8 per channel", 30, "model.layers.10.mlp.down_proj", 2**25)
    console = Console(file=io.StringIO(), width=80)
    console.print(Contents("folder", "int8fx", {}, [kind], (62, 2**27), (1, 2**28)))
    _, head, *lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    parts = [line[head.index("example") :] for line in lines]
    assert [part for part in parts if part] == ["model.layers.", "10.mlp.", "down_proj"]


def run(capsys, *arguments: str):
    code = int8fx.cli.app.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands(capsys, tmp_path):
    folder, _ = written(tmp_path / "theirs", "gptq-4-v1", count=2)
    out = tmp_path / "converted"
    code, printed, _ = run(
        capsys, "convert", str(folder), str(out), "--to", "compressed-tensors", "--json"
    )
    assert code == 0 and json.loads(printed)["modules"] == 2
    code, printed, _ = run(capsys, "inspect", str(out), "--json")
    assert code == 0 and json.loads(printed)["format"] == "compressed-tensors"
    code, printed, _ = run(capsys, "inspect", str(folder))
    assert code == 0 and "GPTQ, bits 4, group_size 32" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere"], "PATH nowhere: no such file or directory"),
        (["convert", "nowhere", "out"], "SRC nowhere: no such file or directory"),
        (["convert", "theirs", "theirs"], "DST theirs is there already"),
        (
            ["convert", "theirs", "out", "--to", "gptq"],
            "--to gptq: allowed: int8fx, compressed-tensors",
        ),
        (["inspect", "empty"], "neither model.safetensors nor model.safetensors.index.json in empty"),
    ],
)
def test_an_error_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "theirs", "gptq-4-v1")
    (tmp_path / "empty").mkdir()
    code, _, printed = run(capsys, *arguments)
    assert code == 1 and words in printed and len(printed.splitlines()) == 1
    assert "torch" in sys.modules
