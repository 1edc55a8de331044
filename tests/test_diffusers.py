"""The quantiser of diffusers: a toy UNet and a toy DiT, loaded, saved, read by who imports nothing."""

import json

import pytest
import torch
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CheckpointError
from int8fx.testing.installed import install, run

diffusers = pytest.importorskip("diffusers")

import safetensors.torch  # noqa: E402
from diffusers import DiTTransformer2DModel, UNet2DConditionModel  # noqa: E402

from int8fx.integrations.diffusers import SKIP, Int8FxConfig  # noqa: E402


def unet():
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=8,
        num_embeds_ada_norm=10,
    )


def image(model):
    x, step = torch.linspace(-1, 1, 256).view(1, 4, 8, 8), torch.tensor([3])
    with torch.no_grad():
        if isinstance(model, UNet2DConditionModel):
            return model(x, step, torch.linspace(-1, 1, 160).view(1, 5, 32)).sample
        return model(x, timestep=step, class_labels=torch.tensor([1])).sample


@pytest.fixture(scope="module", params=[unet, dit], ids=["UNet", "DiT"])
def loaded(request, tmp_path_factory):
    """The float model, and the int8 one that was read from its files."""
    torch.manual_seed(0)
    model, folder = request.param().eval(), tmp_path_factory.mktemp("float")
    model.save_pretrained(folder)
    return model, type(model).from_pretrained(folder, quantization_config=Int8FxConfig(threshold=3.0))


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    loaded[1].save_pretrained(folder, max_shard_size="20KB")
    return folder


def assert_same_model(model, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Float convolutions round otherwise in tensors that lie at another place of their file.
    torch.testing.assert_close(image(model), image(expected), rtol=1e-4, atol=1e-5)


def test_what_depends_on_the_time_step_alone_stays_in_float(loaded):
    _, model = loaded
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    int8 = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if isinstance(parameter, Int8Weight)
    }
    in_float = linears - int8
    parts = ("time_emb", "timestep_embedder", "norm1.linear", "proj_out")
    assert in_float and all(any(part in name for part in parts) for name in in_float)
    assert {name.rpartition(".")[2] for name in int8} >= {"to_q", "to_k", "to_v", "proj"}


def test_it_computes_what_quantize_makes_of_the_float_model(loaded, tmp_path):
    floats, model = loaded
    floats.save_pretrained(tmp_path)
    other = int8fx.quantize_(type(floats).from_pretrained(tmp_path), threshold=3.0, skip=list(SKIP))
    assert_same_model(model, other)
    error = (image(model) - image(floats)).norm() / image(floats).norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("options", [{}, {"device_map": {"": "cpu"}}, {"torch_dtype": torch.float32}])
def test_files_in_shards_are_read_again(loaded, saved, options):
    assert len(list(saved.glob("*.safetensors"))) > 10
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "int8fx", "threshold": 3.0, "skip": list(SKIP)}
    _, expected = loaded
    assert_same_model(type(expected).from_pretrained(saved, **options), expected)


def test_what_quantize_changed_is_saved_and_read_in_int8(loaded, tmp_path):
    floats, _ = loaded
    floats.save_pretrained(tmp_path / "float")
    model = int8fx.quantize_(type(floats).from_pretrained(tmp_path / "float"), threshold=3.0)
    model.save_pretrained(tmp_path / "int8")
    assert_same_model(type(floats).from_pretrained(tmp_path / "int8"), model)
    model.dequantize()
    assert not any(isinstance(parameter, Int8Weight) for parameter in model.parameters())
    model.save_pretrained(tmp_path / "float again")
    config = json.loads((tmp_path / "float again" / "config.json").read_text())
    assert "quantization_config" not in config


def test_weights_of_two_thresholds_are_not_saved_as_of_one(tmp_path, caplog):
    model = int8fx.quantize_(dit(), threshold=3.0, only=["*.to_q"])
    int8fx.quantize_(model, threshold=4.0, only=["*.to_k"])
    assert "to_k.weight has {'threshold': 4.0" in caplog.text
    with pytest.raises(ValueError, match="int8fx and is not serializable"):
        model.save_pretrained(tmp_path)


def test_a_fresh_process_that_imports_nothing_reads_them(loaded, saved, tmp_path):
    name = type(loaded[1]).__name__
    code = (
        f"import diffusers, sys, torch; assert 'int8fx' not in sys.modules\n"
        f"model = diffusers.{name}.from_pretrained({str(saved)!r})\n"
        f"state = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}\n"
        f"torch.save(state, {str(tmp_path / 'state.pt')!r})"
    )
    environment = install(tmp_path / "installed")
    done = run(code, environment)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt")
    for key, tensor in loaded[1].state_dict().items():
        assert torch.equal(state[key], tensor), key
    refused = run(code, environment, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "Unknown quantization type, got int8fx" in refused.stderr


@pytest.mark.parametrize("end", ["weight", "weight_scale"])
def test_half_a_weight_is_named(loaded, tmp_path, end):
    _, model = loaded
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = safetensors.torch.load_file(file)
    gone = next(name for name in state if name.endswith("to_q." + end))
    del state[gone]
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{gone.removesuffix('_scale')}.*without the other"):
        type(model).from_pretrained(tmp_path)


def test_what_cannot_be_loaded(loaded, saved, tmp_path):
    kind = type(loaded[1])
    with pytest.raises(ValueError, match="cannot stay on disk"):
        kind.from_pretrained(saved, device_map={"": "disk"}, offload_folder=tmp_path)
    loaded[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no weight of {kind.__name__} can be quantised"):
        kind.from_pretrained(tmp_path, quantization_config=Int8FxConfig(only=["nothing"]))
    with pytest.raises(ValueError, match="unknown option 'treshold' for Int8FxConfig"):
        Int8FxConfig(treshold=6.0)


def test_plus_adds_to_what_stays_in_float_by_default():
    assert Int8FxConfig(skip=["+*.ff.*"]).options["skip"] == [*SKIP, "*.ff.*"]
    assert Int8FxConfig(skip=["*.ff.*"]).options["skip"] == ["*.ff.*"]
    assert Int8FxConfig().options["skip"] == list(SKIP)


def test_rules_give_files_of_several_formats(tmp_path):
    torch.manual_seed(0)
    model = dit().eval()
    int8fx.quantize_(model, rules=[("*.attn1.*", "w8a16-group", {"group_size": 32})])
    model.save_pretrained(tmp_path)
    read = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    schemes = {
        weight.choice.scheme.name
        for weight in read.parameters()
        if isinstance(weight, int8fx.QuantizedWeight)
    }
    assert schemes == {"w8a16-group", "llm.int8"}
    assert torch.equal(image(read), image(model))
