"""The quantiser of transformers: load, save, generate, refuse."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CalibrationError, CheckpointError
from int8fx.integrations.transformers import Int8FxConfig
from int8fx.kernels.cpu import pages
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.testing.four_bits import W4A16
from int8fx.torch_private import release

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A bf16 Llama in shards, and its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("floats")
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(path, max_shard_size="50KB")
    return path, model.state_dict()


@pytest.fixture(scope="module")
def model(floats):
    return load(floats[0], quantization_config=Int8FxConfig(threshold=5.0))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8")
    model.save_pretrained(path, max_shard_size="30KB")
    return path


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(8).unsqueeze(0)).logits


def test_every_linear_but_the_head_is_int8_and_of_the_right_values(floats, model):
    _, state = floats
    weight = model.get_parameter(UP)
    assert type(weight) is Int8Weight and weight.threshold == 5.0 and not weight.requires_grad
    w_int8, w_scale = quantize_weight(state[UP])
    assert torch.equal(weight.w_int8, w_int8) and torch.equal(weight.w_scale, w_scale)
    kinds = {name: type(parameter) is Int8Weight for name, parameter in model.named_parameters()}
    assert sum(kinds.values()) == 2 * 7
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_the_footprint_is_that_of_the_tensors(model):
    expected = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        is_int8 = isinstance(parameter, Int8Weight)
        expected += parameter.int8_bytes if is_int8 else parameter.nbytes
    assert round(model.get_memory_footprint()) == expected


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_save_and_load_bit_for_bit(model, saved, device_map):
    assert len(list(saved.glob("*.safetensors"))) > 1
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "int8fx", "threshold": 5.0}
    read = load(saved, device_map=device_map)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    assert read.get_parameter(UP).threshold == 5.0
    assert torch.equal(logits(read), logits(model))


def test_what_was_read_in_int8_is_saved_again(model, saved, tmp_path):
    load(saved).save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model, saved, cache):
    tokens = torch.arange(8).unsqueeze(0)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(tokens, **options)
    assert expected.shape == (1, 12)
    assert torch.equal(load(saved).generate(tokens, **options), expected)


def test_generate_compiled(floats):
    config = AutoConfig.from_pretrained(floats[0], num_hidden_layers=1, num_key_value_heads=4)
    model = int8fx.quantize_(LlamaForCausalLM(config).eval())
    tokens = torch.arange(8).unsqueeze(0)
    options = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, **options)
    torch._dynamo.reset()
    # A region of it: whole models are compiled elsewhere, at their price.
    model.model.layers[0].mlp.compile(backend="llmint8", dynamic=True)
    with int8fx.collect_reports() as reports:
        assert torch.equal(model.generate(tokens, **options), expected)
    assert reports and all(len(report.accepted) == 3 for report in reports)


# Of a mask, and with the backend "inductor" alone, too: error: ‘tmp2’ was not declared in this scope.
NO_MASK = pytest.mark.skipif(release() < (2, 12), reason="torch 2.11 writes C++ that does not compile")


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=NO_MASK), "static"])
def test_generate_with_the_whole_model_compiled(floats, cache):
    config = AutoConfig.from_pretrained(floats[0], num_hidden_layers=1)
    model = int8fx.quantize_(LlamaForCausalLM(config).eval())
    tokens = torch.arange(8).unsqueeze(0)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(tokens, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="llmint8", dynamic=True)
    with int8fx.collect_reports() as reports:
        assert torch.equal(model.generate(tokens, **options), expected)
    assert reports and all(len(report.accepted) == 7 for report in reports)


def test_conv1d_and_a_tied_head(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "floats")
    read = load(tmp_path / "floats", quantization_config=Int8FxConfig(skip=[]))
    assert read.lm_head.weight is read.transformer.wte.weight
    assert type(read.lm_head.weight) is torch.nn.Parameter
    weight = read.transformer.h[0].mlp.c_fc.weight
    assert weight.transposed and weight.shape == (32, 128)
    read.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert torch.equal(again.transformer.h[0].mlp.c_fc.weight, weight)
    assert torch.equal(logits(again), logits(read))


@pytest.mark.parametrize("way", [lambda model: model.dequantize(), int8fx.dequantize_])
def test_dequantize(saved, tmp_path, way):
    model = load(saved)
    expected = model.get_parameter(UP).dequantize()
    way(model)
    assert type(model.get_parameter(UP)) is torch.nn.Parameter
    assert torch.equal(model.get_parameter(UP), expected)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "fusion_config"} & config.keys()  # plain files again


def test_what_quantize_changed_is_saved_and_read_in_int8(floats, tmp_path):
    model = int8fx.quantize_(load(floats[0]), threshold=3.0, skip=["*.down_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    read = load(tmp_path, ignore_mismatched_sizes=True)
    assert read.get_parameter(UP).threshold == 3.0
    assert type(read.get_parameter(UP.replace("up_proj", "down_proj"))) is nn.Parameter
    assert torch.equal(logits(read), logits(model))


def test_a_calibration_goes_with_the_files(floats, tmp_path):
    """Columns are each weight's own, and the output head is in int8 as well."""
    path, _ = floats
    calibration = int8fx.calibrate(load(path), [torch.arange(8).unsqueeze(0)])
    calibration.save(tmp_path / "calibration.json")
    config = Int8FxConfig(scheme="int8-rotated", calibration=tmp_path / "calibration.json", columns=3)
    model = load(path, quantization_config=config)
    weights = {
        name: weight for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)
    }
    assert "lm_head.weight" in weights
    for linear in calibration.linears:
        kept = weights[f"{linear.path}.weight"].options["columns"]
        assert kept == tuple(sorted(linear.columns[:3]))
    model.save_pretrained(tmp_path / "int8")
    written = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "int8fx", "scheme": "int8-rotated"}
    (tmp_path / "calibration.json").unlink()
    read = load(tmp_path / "int8")
    assert read.get_parameter("lm_head.weight").options == weights["lm_head.weight"].options
    assert torch.equal(logits(read), logits(model))
    in_place = int8fx.quantize_(load(path), scheme="int8-rotated", calibration=calibration, columns=3)
    assert torch.equal(logits(in_place), logits(model))
    in_place.save_pretrained(tmp_path / "in place")
    assert torch.equal(logits(load(tmp_path / "in place")), logits(model))


def test_a_calibration_of_another_model_is_named(floats):
    calibration = int8fx.calibrate(nn.Linear(32, 32), [torch.zeros(1, 32)])
    config = Int8FxConfig(scheme="int8-rotated", calibration=calibration)
    with pytest.raises(CalibrationError, match=r"not in the calibration, which is of a Linear"):
        load(floats[0], quantization_config=config)


def test_a_model_inside_of_a_quantised_module_is_saved_and_read_in_int8(floats, tmp_path):
    model = load(floats[0])
    int8fx.quantize_(nn.Sequential(nn.Linear(64, 64), model), threshold=3.0, only=["1.*.up_proj"])
    model.save_pretrained(tmp_path)
    read = load(tmp_path)
    assert read.get_parameter(UP).threshold == 3.0
    assert torch.equal(logits(read), logits(model))


def test_weights_of_two_thresholds_are_not_saved_as_of_one(floats, tmp_path):
    model = int8fx.quantize_(load(floats[0]), threshold=3.0, only=["*.up_proj"])
    int8fx.quantize_(model, threshold=4.0, only=["*.down_proj"])
    with pytest.raises(ValueError, match=r"down_proj.weight has .*4\.0.* one setting for all.*3\.0"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 6.0}, "unknown option 'treshold' for Int8FxConfig; allowed: calibration,"),
        ({"threshold": -1}, "option 'threshold' of Int8FxConfig: given -1"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Int8FxConfig(**options)


def test_what_cannot_be_loaded(floats):
    with pytest.raises(ValueError, match=r"no weight of LlamaForCausalLM can be quantised\n  model"):
        load(floats[0], quantization_config=Int8FxConfig(only=["nothing"]))


AT_HOME = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = {**dict.fromkeys(AT_HOME, "cpu"), "model.layers.1": "disk"}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("device_map", ["auto", ON_DISK], ids=["auto", "given"])
def test_what_memory_does_not_hold_stays_on_disk(floats, model, saved, tmp_path, quantised, device_map):
    path = saved if quantised else floats[0]
    options = {} if quantised else {"quantization_config": Int8FxConfig(threshold=5.0)}
    memory = {"max_memory": {"cpu": 60_000}} if device_map == "auto" else {}
    folder = {"offload_folder": tmp_path / "offload"}
    read = load(path, **options, **memory, **folder, device_map=device_map)
    assert "disk" in read.hf_device_map.values()
    assert type(read.get_parameter(UP)) is Int8Weight and read.get_parameter(UP).is_meta
    for _ in range(2):
        assert torch.equal(logits(read), logits(model))
    tokens, greedy = torch.arange(8).unsqueeze(0), {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(read.generate(tokens, **greedy), model.generate(tokens, **greedy))
    with pytest.warns(UserWarning, match="offloaded modules"):
        read.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


def test_int8_files_need_a_folder_for_what_is_offloaded(saved):
    with pytest.raises(ValueError, match="Please provide an `offload_folder`"):
        load(saved, device_map=ON_DISK)


@pytest.mark.parametrize("quantised", [False, True])
def test_what_another_device_works_on_waits_on_the_cpu(floats, model, saved, quantised):
    """With "meta" in the place of a GPU, which computes nothing."""
    from accelerate.hooks import remove_hook_from_submodules

    path = saved if quantised else floats[0]
    options = {} if quantised else {"quantization_config": Int8FxConfig(threshold=5.0)}
    away = dict.fromkeys(AT_HOME, "meta") | {"model.layers.1": "cpu"}
    read = load(path, **options, device_map=away)
    assert type(read.get_parameter(UP)) is Int8Weight and read.get_parameter(UP).is_meta
    with torch.no_grad():
        assert read(torch.arange(8, device="meta").unsqueeze(0)).logits.shape == (1, 8, 100)
    remove_hook_from_submodules(read)
    assert torch.equal(read.get_parameter(UP), model.get_parameter(UP))


@pytest.fixture
def without_int8fx(monkeypatch):
    """transformers as it is where int8fx is not installed."""
    from transformers.quantizers import auto

    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(table, "int8fx")


@pytest.mark.parametrize("ignore", [False, True])
def test_where_int8fx_is_not_installed_int8_files_name_it(saved, without_int8fx, caplog, ignore):
    """transformers skips a quantisation that it does not know, and then makes up each weight whose
    shape does not fit, if its caller allows that."""
    with pytest.raises(ValueError, match=r"the weights are int8 of int8fx.*pip install int8fx"):
        load(saved, ignore_mismatched_sizes=ignore)
    assert "Unknown quantization type, got int8fx" in caplog.text


def test_where_int8fx_is_not_installed_files_without_its_name_are_refused(
    saved, tmp_path, without_int8fx, caplog
):
    """Of files that do not ask for it: of versions before, or with a configuration of one's own."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fusion_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RuntimeError, match="`ignore_mismatched_sizes` to `False`, thus raising an error"
    ):
        load(tmp_path)
    assert "Unknown quantization type, got int8fx" in caplog.text
    assert "ckpt: torch.Size([1, 128, 64]) vs model:torch.Size([128, 64])" in caplog.text


def test_files_that_do_not_ask_for_int8fx_are_read_as_well(model, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fusion_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_fusion_of_the_users_own_stays(floats, tmp_path):
    own = {"patch_embeddings": False}
    read = load(floats[0], quantization_config=Int8FxConfig(), fusion_config=own)
    read.save_pretrained(tmp_path)
    assert own.items() < json.loads((tmp_path / "config.json").read_text())["fusion_config"].items()
    again = load(tmp_path)
    again.dequantize()
    assert again.config.fusion_config == own


def test_files_with_weights_in_their_own_shape_are_read_as_well(model, saved, tmp_path):
    """What we wrote before."""
    state = {
        name: tensor.squeeze(0) if tensor.dtype == torch.int8 else tensor
        for name, tensor in model.state_dict().items()
    }
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(tmp_path)), logits(model))


def other_dtype(state):
    state[UP] = state[UP].to(torch.int32)


def other_shape(state):
    state[UP] = state[UP][:, :-1].contiguous()


def without_scale(state):
    del state[f"{UP}_scale"]


def without_values(state):
    del state[UP]


def without_both(state):
    del state[UP], state[f"{UP}_scale"]


def nan_scale(state):
    state[f"{UP}_scale"][3] = float("nan")


# transformers logs what is wrong with a tensor, and raises that something is.
IN_A_TENSOR = {
    other_dtype: f"{UP}: torch.int32 in the checkpoint; allowed: int8, or a float",
    other_shape: f"{UP}: shape [127, 64] in the checkpoint, [128, 64] in the model",
    without_scale: f"{UP}: int8 values without their scales, {UP}_scale or ",
    without_values: f"{UP}: its scales are there, and its int8 values are missing",
    without_both: f"{UP}: in the model, and missing in the checkpoint",
    nan_scale: f"{UP}: corrupt: a scale that is not finite, or not above 0",
}


@pytest.mark.parametrize("spoil", IN_A_TENSOR, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_names_the_tensor(model, tmp_path, caplog, spoil):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil(state)
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, CheckpointError)) as raised:
        load(tmp_path)
    assert IN_A_TENSOR[spoil] in caplog.text + str(raised.value)


def test_files_of_another_class_lack_its_head(saved):
    model = LlamaForSequenceClassification.from_pretrained(saved, num_labels=64)
    assert type(model.get_parameter(UP)) is Int8Weight
    assert type(model.score.weight) is nn.Parameter


@pytest.mark.parametrize("quantised", [False, True])
def test_a_shard_that_is_broken_off_is_named_with_its_tensor(floats, saved, tmp_path, quantised):
    shutil.copytree(saved if quantised else floats[0], tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    (first, *_, last) = safetensors.torch.load_file(shard)
    shard.write_bytes(shard.read_bytes()[:-1])
    options = {} if quantised else {"quantization_config": Int8FxConfig()}
    with pytest.raises(CheckpointError, match=f"{shard.name}: broken off in (.*weight)") as raised:
        load(tmp_path, **options)
    assert str(raised.value).rpartition(" ")[2] in (first, last)


def test_a_shard_that_is_not_there_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(tmp_path)


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path):
    tensor = torch.randn(1000, 1000)
    safetensors.torch.save_file({"weight": tensor}, tmp_path / "file.safetensors")
    mapped = safetensors.torch.load_file(tmp_path / "file.safetensors")["weight"]

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    assert torch.equal(mapped, tensor)
    before = resident()
    pages.release_mapped(mapped)
    assert before - resident() > 3000
    assert torch.equal(mapped, tensor)
    own = tensor.clone()
    pages.release_mapped(own)
    assert torch.equal(own, tensor)


def test_a_checkpoint_of_experts_warns_of_what_stays_in_float(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="quantize_ leaves") as caught:
        model = load(tmp_path, quantization_config=Int8FxConfig())
    assert sum("experts, in model.layers.*.mlp.experts" in str(w.message) for w in caught) == 1
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj.weight) is Int8Weight
    assert layer.mlp.experts.down_proj.is_floating_point()
    assert layer.mlp.gate.weight.is_floating_point() and type(layer.mlp.gate.weight) is nn.Parameter


def test_a_state_dict_of_mapped_tensors_keeps_what_its_owner_wrote(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=100,
    )
    safetensors.torch.save_file(LlamaForCausalLM(config).state_dict(), tmp_path / "file.safetensors")
    mapped = safetensors.torch.load_file(tmp_path / "file.safetensors")
    for tensor in mapped.values():
        tensor.add_(1.0)
    edited = {name: tensor.clone() for name, tensor in mapped.items()}
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=mapped, quantization_config=Int8FxConfig()
    )
    assert all(torch.equal(mapped[name], tensor) for name, tensor in edited.items())
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(up).w_int8, quantize_weight(edited[up])[0])


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "llm.int8-zeropoint", "threshold": 3.0},
        {"scheme": "w8a16-group", "group_size": 32},
        {"scheme": W4A16.name, "group": 32},
    ],
    ids=lambda options: options["scheme"],
)
def test_files_of_another_scheme(floats, tmp_path, monkeypatch, options):
    monkeypatch.setitem(int8fx.SCHEMES, W4A16.name, W4A16)
    model = load(floats[0], quantization_config=Int8FxConfig(**options))
    quantized = int8fx.quantize_(load(floats[0]), **options)
    tokens = torch.arange(8).unsqueeze(0)
    for number, each in enumerate((model, quantized)):
        path = tmp_path / str(number)
        each.save_pretrained(path, max_shard_size="30KB")
        again = load(path)
        weight = again.get_parameter(UP)
        assert weight.options == {**int8fx.SCHEMES[options["scheme"]].choice().options, **options}
        assert torch.equal(weight, model.get_parameter(UP))
        assert torch.equal(again(tokens).logits, model(tokens).logits)
