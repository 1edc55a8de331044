"""``from_pretrained`` of other systems' files: by int8fx where their owner's package is missing."""

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import int8fx
from int8fx.errors import CheckpointError
from int8fx.testing import foreign_files
from int8fx.testing.foreign_files import numbers
from int8fx.weights.checkpoint_files import metadata
from int8fx.weights.tensor import QuantizedWeight

transformers = pytest.importorskip("transformers")
readers = pytest.importorskip("int8fx.integrations.transformers_readers")

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As on a machine without the owners' packages."""
    monkeypatch.setattr(readers, "_preferred", set(readers.OWNERS))


def llama(dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def of(name: str, N: int, K: int):
    if name == "gptq-act-order":
        return foreign_files.gptq(numbers(N, K, 4, 16, act_order=True), 4, 16)
    if name == "fp8":  # of both signs, as a model's weights are
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(N, K, generator=random).to(torch.float8_e4m3fn)
        scale = torch.rand(N // 32, K // 32, generator=random) * 0.02 + 0.01
        return foreign_files.fp8(weight, scale, (32, 32))
    return foreign_files.samples()[name](N, K)


def files(folder, name: str, model=None):
    """A model's files with some linears as another system has them, and the model in float."""
    model = model or llama()
    state, modules = model.state_dict(), {}
    for layer in range(2):
        for linear in LINEARS:
            path = f"model.layers.{layer}.{linear}"
            modules[path] = of(name, *state[f"{path}.weight"].shape)
            state[f"{path}.weight"] = modules[path].w_hat.to(model.dtype)
    model.load_state_dict(state)
    plain = {n: t for n, t in state.items() if n.removesuffix(".weight") not in modules}
    foreign_files.write(folder, modules, plain, model.config.to_dict())
    return model


NAMES = ("gptq-4-v1", "gptq-act-order", "awq-gemm", "nf4", "nf4-nested", "compressed-tensors-w4a16",
         "compressed-tensors-w8a8", "eetq", "hqq-4-axis1", "hqq-4-axis0")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_loaded_packed_and_computes(name, tmp_path):
    floats = files(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), floats.model.layers[1].mlp.up_proj.weight)
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
    expected, found = floats(IDS).logits, model(IDS).logits
    bound = 0.05 if weight.options["scheme"] == "absmax-vector" else 1e-4
    assert (found - expected).norm() <= bound * expected.norm()


ANY = (*NAMES, "quanto-8", "quanto-4", "quanto-4-integer", "quanto-2", "torchao-intx-4", "torchao-int4",
       "torchao-int8", "fp8", "mxfp4")  # fmt: skip


@pytest.mark.parametrize("name", ANY)
def test_the_weights_are_those_that_load_checkpoint_reads(name, tmp_path):
    floats = files(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    other = int8fx.load_checkpoint(llama(), tmp_path)
    for path in LINEARS:
        weight, same = (each.model.layers[1].get_submodule(path).weight for each in (model, other))
        assert isinstance(weight, QuantizedWeight)
        assert weight.options == same.options
        assert torch.equal(weight.dequantize(), same.dequantize())
    logits = model(IDS).logits
    assert torch.equal(logits, other(IDS).logits)
    # Of fp8 the weights are quantised again; of W8A8 the activations are.
    in_int8 = weight.options["scheme"] in ("llm.int8", "absmax-vector")
    expected = floats(IDS).logits
    assert (logits - expected).norm() <= (0.05 if in_int8 else 1e-4) * expected.norm()


@pytest.mark.parametrize("name", ["quanto-8", "torchao-intx-4"])
def test_files_of_the_model_without_its_head(name, tmp_path):
    """Their names begin behind ``model.``, and so do those in quanto's map and torchao's header."""
    model = llama()
    whole = files(tmp_path / "whole", name, model)
    base = files_of_base(tmp_path / "base", name, model)
    found = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weight = found.model.layers[1].mlp.up_proj.weight
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), whole.model.layers[1].mlp.up_proj.weight)


def files_of_base(folder, name: str, model):
    state = model.model.state_dict()
    paths = [f"layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]
    modules = {path: of(name, *state[f"{path}.weight"].shape) for path in paths}
    plain = {n: t for n, t in state.items() if n.removesuffix(".weight") not in modules}
    return foreign_files.write(folder, modules, plain, model.config.to_dict())


def test_the_model_generates_compiled(tmp_path):
    files(tmp_path, "gptq-4-v1")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(IDS, **kwargs)
    model.compile(backend="llmint8", options={"skip": ["*"]})
    assert torch.equal(model.generate(IDS, **kwargs), eager)


def test_saved_as_ours_and_read_again(tmp_path):
    files(tmp_path / "theirs", "awq-gemm")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "int8fx"


def test_groups_of_rows_have_no_configuration_to_be_saved_with(tmp_path):
    floats = files(tmp_path / "theirs", "hqq-4-axis0")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "ours")
    model.dequantize()
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight, floats.model.layers[1].mlp.up_proj.weight
    )


def test_float_tensors_take_the_dtype_that_is_asked_for(tmp_path):
    files(tmp_path, "gptq-4-v1")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_scaled_activation(tmp_path):
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, alibi=False
    )
    torch.manual_seed(0)
    floats = transformers.FalconForCausalLM(config).eval().requires_grad_(False)
    path = "transformer.h.0.mlp.dense_h_to_4h"
    foreign = foreign_files.awq_gemm(numbers(256, 64, 4, 32), 32)
    state = floats.state_dict()
    state[f"{path}.weight"] = foreign.w_hat.float()
    floats.load_state_dict(state)
    scales = torch.rand(256) + 0.5
    plain = {n: t for n, t in state.items() if not n.startswith((path, "lm_head"))}
    plain["transformer.h.0.mlp.act.scales"] = scales
    foreign_files.write(tmp_path, {path: foreign}, plain, config.to_dict())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    act = floats.transformer.h[0].mlp.act
    floats.transformer.h[0].mlp.act = torch.nn.Sequential(act, Divide(scales))
    expected = floats(IDS).logits
    assert (model(IDS).logits - expected).norm() <= 1e-4 * expected.norm()


class Divide(torch.nn.Module):
    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def forward(self, x):
        return x / self.scales


def change(folder, remove: str):
    file = folder / "model.safetensors"
    tensors, said = load_file(file), metadata(file)
    del tensors[remove]
    save_file(tensors, file, said)


def test_a_broken_file_is_named(tmp_path):
    files(tmp_path, "gptq-4-v1")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"broken off|incomplete|invalid"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_an_unknown_option_is_named(tmp_path):
    files(tmp_path, "gptq-4-v1")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v3"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="checkpoint_format = 'gptq_v3'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("gptq-4-v1", "scales"),
        ("quanto-8", "weight._scale"),
        ("quanto-4", "weight._shift"),
        ("torchao-intx-4", "_weight_scale"),
        ("torchao-int4", "_weight_zero_point"),
        ("torchao-int8", "_weight_scale"),
        ("mxfp4", "weight_scales"),
    ],
)
def test_a_part_of_a_weight_is_missing(name, entry, tmp_path):
    files(tmp_path, name)
    change(tmp_path, f"model.layers.1.mlp.up_proj.{entry}")
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.up_proj\.{entry}: missing in the"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_float8_without_its_scales(tmp_path):
    files(tmp_path, "fp8")
    change(tmp_path, "model.layers.1.mlp.up_proj.weight_scale_inv")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: torch\.float8_e4m3fn without scales"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_a_damaged_map_of_quantos(tmp_path):
    files(tmp_path, "quanto-8")
    (tmp_path / "quanto_qmap.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quanto_qmap\.json: damaged"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_quantos_map_is_looked_for_in_the_models_folder_alone(tmp_path, monkeypatch):
    files(tmp_path, "quanto-8")
    monkeypatch.chdir(tmp_path)
    get = transformers.modeling_utils.get_hf_quantizer
    found, *_ = get(llama().config, None, None, True, {})
    assert found is None
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    found, *_ = get(config, None, None, True, {})
    assert isinstance(found, readers.ReaderQuantizer)


@pytest.mark.parametrize("name", ["gptq-4-v1", "fp8", "torchao-int8"])
def test_experts_in_one_batch_are_refused(name, tmp_path):
    """transformers would put float8 without its scales there, or make numbers up."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_experts=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    path = "model.layers.0.mlp.experts.1.gate_proj"
    foreign_files.write(tmp_path, {path: of(name, 64, 64)}, {}, config.to_dict())
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_proj: .* of an expert"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_shards_are_refused():
    model = llama()
    model.config.distributed_config = types.SimpleNamespace(tp_size=2)
    config = readers.ReaderConfig(quant_method="gptq", bits=4)
    quantizer = readers.ReaderQuantizer(config, pre_quantized=True)
    with pytest.raises(ValueError, match="cannot be read in shards"):
        quantizer.preprocess_model(model)


# --- who reads -------------------------------------------------------------------------------------


def test_an_owner_that_is_installed_reads_its_files(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(readers, "_preferred", set())
    files(tmp_path, "nf4", llama(torch.bfloat16))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(readers, "_preferred", set())
    monkeypatch.setattr(readers, "_is_there", lambda need: True)
    assert not readers.serves("gptq")
    readers.read_with_int8fx("gptq")
    assert readers.serves("gptq") and not readers.serves("awq")
    readers.read_with_int8fx()
    assert all(map(readers.serves, readers.OWNERS))
    with pytest.raises(ValueError, match="read_with_int8fx: 'aqlm'; allowed: gptq, awq"):
        readers.read_with_int8fx("aqlm")


def test_an_owner_that_is_missing(monkeypatch):
    monkeypatch.setattr(readers, "_preferred", set())
    monkeypatch.setattr(readers, "_is_there", lambda need: need != "gptqmodel")
    assert readers.serves("gptq") and readers.serves("awq") and not readers.serves("compressed-tensors")


def test_int8fx_knows_no_other_methods_than_it_reads():
    import int8fx_autoload

    assert {*int8fx_autoload.READ, "gguf"} == set(readers.OWNERS)
    known = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert known["gptq"].__name__ == "GPTQConfig"
    assert int8fx_autoload.READER == readers.METHOD
    assert int8fx.__version__
