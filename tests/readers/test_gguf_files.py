"""GGUF files: read packed into transformers' models, and refused by name where they are damaged."""

import struct

import numpy as np
import pytest
import torch

import int8fx
from int8fx.bench import smollm2
from int8fx.errors import CheckpointError
from int8fx.testing.gguf_names import named
from int8fx.weights.readers.opening import opened
from int8fx.weights.tensor import QuantizedWeight

init_empty_weights = pytest.importorskip("accelerate").init_empty_weights
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HEADS, KV_HEADS, WIDTH = 4, 2, 256
IDS = torch.arange(12).view(2, 6)
TYPES = gguf.GGMLQuantizationType


def llama(kind: str = "llama"):
    configs = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    config = configs[kind](
        vocab_size=64, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write(path, model, kind: str = "llama", quantization: str = "Q4_0") -> None:
    """The model's file; the model takes the values that are in it."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    state = {name: each for name, each in model.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in state.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        rows = interleaved(tensor, heads) if heads and kind == "llama" else tensor
        if tensor.dim() == 2:
            packed = gguf.quants.quantize(rows.float().numpy(), TYPES[quantization])
            writer.add_tensor(named(name), packed, raw_dtype=TYPES[quantization])
            rounded = torch.from_numpy(gguf.quants.dequantize(packed, TYPES[quantization]))
            if heads and kind == "llama":
                rounded = rounded.view(heads, -1, 2, WIDTH).transpose(1, 2).reshape(rounded.shape)
            tensor.copy_(rounded)
        else:
            writer.add_tensor(named(name), rows.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def on_meta(kind: str = "llama"):
    with init_empty_weights():
        model = llama(kind)
    model.tie_weights()
    return model


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_of_transformers(kind, quantization, tmp_path):
    floats = llama(kind)
    write(tmp_path / "model.gguf", floats, kind, quantization)
    model = int8fx.load_checkpoint(on_meta(kind), tmp_path / "model.gguf")
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert isinstance(weight, QuantizedWeight)
    expected = floats.model.layers[1].self_attn.q_proj.weight
    assert (weight.dequantize() - expected).abs().max() <= 2**-22 * expected.abs().max()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = floats(IDS).logits
    assert (model(IDS).logits - logits).norm() <= 1e-4 * logits.norm()


@pytest.fixture
def asked():
    """int8fx reads GGUF files, and after the test whoever did before it."""
    readers = pytest.importorskip("int8fx.integrations.transformers_readers")
    with readers.reading("gguf"):
        yield


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_from_pretrained(kind, quantization, asked, tmp_path):
    floats = llama(kind)
    write(tmp_path / "model.gguf", floats, kind, quantization)
    model = from_pretrained(tmp_path, floats.config)
    other = int8fx.load_checkpoint(on_meta(kind), tmp_path / "model.gguf")
    for name, parameter in other.named_parameters():
        found = model.get_parameter(name)
        assert isinstance(found, QuantizedWeight) is isinstance(parameter, QuantizedWeight)
        assert torch.equal(dequantized(found), dequantized(parameter))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(IDS).logits
    assert torch.equal(logits, other(IDS).logits)
    assert (floats(IDS).logits - logits).norm() <= 1e-4 * logits.norm()
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, logits)


def from_pretrained(folder, config, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", config=config, dtype=torch.float32, **how
    )


def dequantized(weight):
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def test_from_pretrained_of_a_model_without_its_head(asked, tmp_path):
    floats = llama()
    write(tmp_path / "model.gguf", floats)
    model = transformers.AutoModel.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=floats.config, dtype=torch.float32
    )
    weight = model.layers[1].self_attn.q_proj.weight
    assert isinstance(weight, QuantizedWeight)
    expected = floats.model.layers[1].self_attn.q_proj.weight
    assert (weight.dequantize() - expected).abs().max() <= 2**-22 * expected.abs().max()


def test_transformers_reads_what_int8fx_was_not_asked_for(tmp_path):
    floats = llama()
    write(tmp_path / "model.gguf", floats)
    model = from_pretrained(tmp_path, floats.config)
    assert not any(isinstance(each, QuantizedWeight) for each in model.parameters())


def test_float_that_is_asked_for_is_float(asked, tmp_path):
    floats = llama()
    write(tmp_path / "model.gguf", floats)
    how = transformers.GgufConfig(dequantize=True)
    model = from_pretrained(tmp_path, floats.config, quantization_config=how)
    assert not any(isinstance(each, QuantizedWeight) for each in model.parameters())


def test_from_pretrained_of_a_file_that_lacks_a_tensor(asked, tmp_path):
    floats = llama()
    write(tmp_path / "model.gguf", floats)
    floats.config.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match=r"layers\.2\..*: in the model, and missing in the"):
        from_pretrained(tmp_path, floats.config)


@pytest.mark.parametrize("size", [300, -1])
def test_from_pretrained_of_a_file_that_is_broken_off(size, asked, tmp_path):
    floats = llama()
    write(tmp_path / "model.gguf", floats)
    file = tmp_path / "model.gguf"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.gguf: broken off"):
        from_pretrained(tmp_path, floats.config)


def test_from_pretrained_of_scales_that_are_not_finite(asked, tmp_path):
    floats = llama()
    write(tmp_path / "model.gguf", floats)
    file = tmp_path / "model.gguf"
    first = opened(file).tensor("blk.1.ffn_up.weight")[0].numpy().tobytes()
    raw = bytearray(file.read_bytes())
    start = raw.index(first)
    raw[start : start + 2] = b"\x00\x7e"  # NaN in fp16
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight: corrupt: a scale"):
        from_pretrained(tmp_path, floats.config)


def test_another_architecture(tmp_path):
    write(tmp_path / "model.gguf", llama(), "llama")
    raw = (
        (tmp_path / "model.gguf")
        .read_bytes()
        .replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba")
    )
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"architecture = 'mamba'; names are known of: llama"):
        int8fx.load_checkpoint(on_meta(), tmp_path / "model.gguf")


def test_a_type_that_is_not_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    blocks = np.zeros((4, 84), dtype=np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=TYPES.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    container = opened(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"model\.gguf: blk\.0\.ffn_up\.weight: Q2_K; read: F32"):
        container.tensor("blk.0.ffn_up.weight")


@pytest.mark.parametrize("size", [3, 23, 60, 300, -1])
def test_a_file_that_is_broken_off(size, tmp_path):
    file = tmp_path / "model.gguf"
    write(file, llama())
    file.write_bytes(file.read_bytes()[:size])
    model = llama()
    before = model.state_dict(keep_vars=True)
    with pytest.raises(CheckpointError, match=r"model\.gguf: broken off"):
        int8fx.load_checkpoint(model, file)
    assert all(model.state_dict(keep_vars=True)[name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"GGML", "no GGUF file"),
        (4, struct.pack("<I", 9), "version 9; read"),
        (4, struct.pack(">I", 3), "version 50331648"),
        (8, struct.pack("<Q", 1 << 40), "broken off"),
        (16, struct.pack("<Q", 1 << 40), "broken off|damaged|twice"),
        (24, struct.pack("<Q", 1 << 60), "broken off in its header"),
    ],
)
def test_a_header_that_is_damaged(at, value, words, tmp_path):
    file = tmp_path / "model.gguf"
    write(file, llama())
    raw = bytearray(file.read_bytes())
    raw[at : at + len(value)] = value
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words):
        opened(file)


def test_a_real_file_is_as_transformers_reads_it():
    """SmolLM2 in Q4_1 and Q8_0, where it is in the cache of ``int8fx demo``."""
    cache = smollm2.cache_directory()
    if not (cache / smollm2.GGUF).exists() or not (cache / smollm2.CONVERTED).is_dir():
        pytest.skip("int8fx demo has not fetched SmolLM2 here")
    auto = transformers.AutoModelForCausalLM
    floats = auto.from_pretrained(cache / smollm2.CONVERTED, dtype=torch.float32).eval()
    with init_empty_weights():
        model = auto.from_config(floats.config, dtype=torch.float32)
    model.tie_weights()
    int8fx.load_checkpoint(model.requires_grad_(False).eval(), cache / smollm2.GGUF)
    ids = torch.arange(100, 140).view(1, -1)
    with torch.no_grad():
        expected = floats(ids).logits
        assert (model(ids).logits - expected).norm() <= 1e-5 * expected.norm()
