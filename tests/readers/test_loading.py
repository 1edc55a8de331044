"""``load_checkpoint`` of other systems' files: the weights are theirs, packed, and the model computes
with them eagerly and compiled."""

import json

import pytest
import torch
from torch import nn

import int8fx
from int8fx.errors import CheckpointError
from int8fx.testing import foreign_files
from int8fx.testing.foreign_files import numbers
from int8fx.weights.tensor import QuantizedWeight

SAMPLES = foreign_files.samples()
N, K = 96, 128
# What has a rounding of fp32 more than w_hat: offsets, a rotation; and what is quantised again.
ROUNDED = {"torchao-int4", "comfyui-convrot", "fp8", "quanto-4", "quanto-2"}


class Model(nn.Module):
    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K, dtype=dtype)
        self.up = nn.Linear(K, N, bias=bias, dtype=dtype)
        self.act = nn.GELU()
        self.head = nn.Linear(N, 32, dtype=dtype)

    def forward(self, x):
        return self.head(self.act(self.up(self.norm(x))))


def plain(bias: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = {name: tensor.clone() for name, tensor in Model(bias).state_dict().items()}
    del state["up.weight"]
    return state


def on_meta(**how) -> Model:
    with torch.device("meta"):
        return Model(**how).requires_grad_(False)


def float_model(foreign) -> Model:
    model = Model().requires_grad_(False)
    model.load_state_dict({**plain(), "up.weight": foreign.w_hat.float()})
    return model


@pytest.mark.parametrize("name", SAMPLES)
def test_a_model_on_the_meta_device_gets_the_weights(name, tmp_path):
    foreign = SAMPLES[name](N, K)
    model = on_meta()
    assert (
        int8fx.load_checkpoint(model, foreign_files.write(tmp_path, {"up": foreign}, plain())) is model
    )
    weight = model.up.weight
    assert isinstance(weight, QuantizedWeight) and not weight.requires_grad
    error = (weight.dequantize() - foreign.w_hat.float()).abs()
    if name == "fp8":  # quantised again
        assert (error.amax(1) <= foreign.w_hat.abs().amax(1) / 127 / 2 * 1.001).all()
    else:
        largest = foreign.w_hat.abs().amax() * (16 if name == "comfyui-convrot" else 1)
        assert error.max() <= (0 if name not in ROUNDED else largest * 2**-22)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    expected = float_model(foreign)(x)
    # Some owners quantise x as well.
    bound = 0.02 if weight.options["scheme"] in ("absmax-vector", "int8-rotated", "llm.int8") else 1e-5
    assert (model(x) - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize(
    ("name", "bits"), [("gptq-4-v1", 4.75), ("awq-gemm", 4.75), ("nf4", 4.5), ("gptq-2-v1", 2.75)]
)
def test_weights_stay_packed(name, bits, tmp_path):
    """Bits a weight: of codes, scales in 16-bit, zero points in 8."""
    model = on_meta()
    int8fx.load_checkpoint(model, foreign_files.write(tmp_path, {"up": SAMPLES[name](N, K)}, plain()))
    assert model.up.weight.int8_bytes * 8 / (N * K) == bits


@pytest.mark.parametrize(
    "name", ["gptq-act-order", "awq-gemv-fast", "nf4", "compressed-tensors-w8a8", "hqq-3-axis0", "eetq"]
)
def test_compiled_is_as_eager(name, tmp_path):
    model = on_meta()
    int8fx.load_checkpoint(model, foreign_files.write(tmp_path, {"up": SAMPLES[name](N, K)}, plain()))
    x = torch.randn(5, K)
    with int8fx.collect_reports() as reports:
        compiled = torch.compile(model, backend="llmint8", options={"skip": ["head"]})(x)
    assert reports[0].decisions[0].accepted
    assert (compiled - model(x)).norm() <= 1e-5 * model(x).norm()


@pytest.mark.parametrize("name", ["gptq-4-v1", "nf4", "hqq-2-axis0", "compressed-tensors-w8a8", "eetq"])
def test_what_was_loaded_is_saved_and_loaded_as_ours(name, tmp_path):
    foreign_files.write(tmp_path / "theirs", {"up": SAMPLES[name](N, K)}, plain())
    model = int8fx.load_checkpoint(on_meta(), tmp_path / "theirs")
    int8fx.save_checkpoint(model, tmp_path / "ours")
    again = int8fx.load_checkpoint(Model().requires_grad_(False), tmp_path / "theirs")
    with torch.no_grad():
        again.norm.weight.zero_()
    int8fx.load_checkpoint(again, tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("symmetric", "scheme"), [(True, "absmax-vector"), (False, "zeropoint-vector")]
)
def test_inputs_are_quantised_as_their_owner_does(symmetric, scheme, tmp_path):
    foreign = SAMPLES["compressed-tensors-w8a8"](N, K)
    foreign_files.write(tmp_path, {"up": foreign}, plain())
    config = json.loads((tmp_path / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"]["symmetric"] = symmetric
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = int8fx.load_checkpoint(on_meta(), tmp_path)
    assert model.up.weight.options["scheme"] == scheme
    assert torch.equal(model.up.weight.dequantize(), foreign.w_hat.float())
    x = torch.randn(5, K)
    expected = float_model(foreign)(x)
    assert (model(x) - expected).norm() <= 0.02 * expected.norm()


def test_a_model_in_memory_keeps_its_dtype(tmp_path):
    foreign_files.write(tmp_path, {"up": SAMPLES["gptq-4-v1"](N, K)}, plain())
    model = int8fx.load_checkpoint(Model(dtype=torch.bfloat16).requires_grad_(False), tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_another_scheme_of_the_same_numbers(tmp_path):
    foreign = SAMPLES["awq-gemm"](N, K)
    foreign_files.write(tmp_path, {"up": foreign}, plain())
    model = int8fx.load_checkpoint(on_meta(), tmp_path, scheme="w4a8-group")
    assert model.up.weight.options["scheme"] == "w4a8-group"
    assert torch.equal(model.up.weight.dequantize().double(), foreign.w_hat)
    with pytest.raises(
        CheckpointError, match=r"up\.weight: 4-bit .* in the checkpoint, and scheme 'w8a16'"
    ):
        int8fx.load_checkpoint(on_meta(), tmp_path, scheme="w8a16")


@pytest.mark.parametrize("zeros", [True, False])
def test_a_bias_of_zeros_for_a_module_without_one(zeros, tmp_path):
    """GPTQ's older writers have a bias everywhere."""
    bias = torch.zeros(N) if zeros else torch.ones(N)
    foreign = foreign_files.gptq(numbers(N, K, 4, 32), 4, 32, bias=bias)
    foreign_files.write(tmp_path, {"up": foreign}, plain(bias=False))
    if zeros:
        int8fx.load_checkpoint(on_meta(bias=False), tmp_path)
    else:
        with pytest.raises(CheckpointError, match=r"up\.bias: in the checkpoint, and not in the model"):
            int8fx.load_checkpoint(on_meta(bias=False), tmp_path)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_of_older_files_are_beside_them(name, tmp_path):
    foreign = SAMPLES["gptq-4-v1" if name == "quantize_config.json" else "awq-gemm"](N, K)
    foreign_files.write(tmp_path, {"up": foreign}, plain())
    config = {key: value for key, value in foreign.config.items() if key != "quant_method"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(config))
    model = int8fx.load_checkpoint(on_meta(), tmp_path)
    assert torch.equal(model.up.weight.dequantize().double(), foreign.w_hat)


def test_an_activation_that_awq_scaled(tmp_path):
    """The next linear's weight has the scales in it, and the activation divides by them."""
    foreign = SAMPLES["awq-gemm"](N, K)
    scales = torch.rand(N) + 0.5
    foreign_files.write(tmp_path, {"up": foreign}, {**plain(), "act.scales": scales})
    model = int8fx.load_checkpoint(on_meta(), tmp_path)
    x = torch.randn(5, K)
    unscaled = float_model(foreign)
    expected = unscaled.head(unscaled.act(unscaled.up(unscaled.norm(x))) / scales)
    assert (model(x) - expected).norm() <= 1e-5 * expected.norm()
    compiled = torch.compile(model, backend="llmint8", options={"skip": ["head"]})
    assert (compiled(x) - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(model.state_dict()["act.scales"], scales)


def test_a_model_that_is_quantised_already(tmp_path):
    foreign_files.write(tmp_path, {"up": SAMPLES["gptq-4-v1"](N, K)}, plain())
    model = int8fx.quantize_(Model().requires_grad_(False))
    with pytest.raises(CheckpointError, match=r"up\.weight: int8 per channel in the model, and GPTQ"):
        int8fx.load_checkpoint(model, tmp_path)


def test_an_embedding_is_dequantised(tmp_path):
    foreign = SAMPLES["compressed-tensors-w8a16"](N, K)
    foreign_files.write(tmp_path, {"0": foreign}, {})
    groups = json.loads((tmp_path / "config.json").read_text())
    groups["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Embedding"]
    (tmp_path / "config.json").write_text(json.dumps(groups))
    model = int8fx.load_checkpoint(nn.Sequential(nn.Embedding(N, K)).requires_grad_(False), tmp_path)
    assert torch.equal(model[0].weight.double(), foreign.w_hat)
