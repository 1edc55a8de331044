"""A checkpoint is read straight into packed weights: memory peaks little above them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from int8fx.testing import foreign_files
from int8fx.testing.foreign_files import Foreign
from int8fx.testing.gguf_names import named

MODULES, N, K = 160, 512, 1024
SAMPLES = foreign_files.samples()

SCRIPT = """
import pathlib, sys
import torch
from torch import nn
import int8fx
from int8fx.weights.tensor import QuantizedWeight

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

with torch.device("meta"):
    linears = (nn.Linear({K}, {N}, bias=False, dtype=torch.bfloat16) for _ in range({MODULES}))
    model = nn.ModuleList(linears)
small = nn.ModuleDict({{"up": nn.Linear({K}, 64, bias=False)}}).requires_grad_(False)
int8fx.load_checkpoint(small, sys.argv[2])  # what is imported and allocated once
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
before = status("VmRSS")
int8fx.load_checkpoint(model.requires_grad_(False), sys.argv[1])
packed = sum(each.int8_bytes for each in model.parameters() if isinstance(each, QuantizedWeight))
print((status("VmHWM") - before) / packed)
"""


@pytest.mark.parametrize("name", ["gptq-4-v1", "awq-gemm", "nf4", "compressed-tensors-w8a8"])
def test_memory_peaks_a_fifth_above_the_packed_model(name, tmp_path):
    """Unpacked integers of one weight come on top, which are a hundredth of this model."""
    one = SAMPLES[name](16, K)
    rows = N // 16
    tall = {key: _repeated(key, tensor, rows) for key, tensor in one.tensors.items()}
    modules = {str(index): Foreign(tall, one.w_hat, one.config) for index in range(MODULES)}
    large = foreign_files.write(tmp_path / "large", modules, {})
    small = foreign_files.write(tmp_path / "small", {"up": SAMPLES[name](64, K)}, {})
    script = SCRIPT.format(K=K, N=N, MODULES=MODULES)
    found = subprocess.run(
        [sys.executable, "-c", script, str(large), str(small)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(found.stdout) <= 1.2


def _repeated(name: str, tensor, rows: int):
    """More rows of the weight, which are the columns of GPTQ's and AWQ's tensors."""
    if name in ("g_idx", "weight.quant_map"):
        return tensor
    if name.startswith("weight.quant_state"):
        return foreign_files.nf4_state(16 * rows, K)
    if name in ("qweight", "qzeros", "scales"):
        return tensor.repeat(1, rows)
    return tensor.repeat(rows, *[1] * (tensor.dim() - 1))


# Enough that the temporaries of one weight, and what layers take besides, are little beside all.
WIDTH, LAYERS = 768, 60
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip

OF_TRANSFORMERS = """
import pathlib, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from int8fx.integrations.transformers_readers import read_with_int8fx
from int8fx.weights.tensor import QuantizedWeight

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def read(folder):
    name = "model.gguf" if pathlib.Path(folder, "model.gguf").exists() else None
    how = {"config": AutoConfig.from_pretrained(folder), "gguf_file": name, "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(folder, **how)

read_with_int8fx()
small = read(sys.argv[2])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = read(sys.argv[1])
packed = sum(each.int8_bytes for each in model.parameters() if isinstance(each, QuantizedWeight))
print((status("VmHWM") - before) / packed)
"""


@pytest.mark.parametrize("name", ["quanto-4", "torchao-int8", "gguf"])
def test_from_pretrained_peaks_a_fifth_above_the_packed_model(name, tmp_path):
    write = _write_gguf if name == "gguf" else _write_tall
    folders = [write(tmp_path / str(layers), name, layers) for layers in (LAYERS, 1)]
    found = subprocess.run(
        [sys.executable, "-c", OF_TRANSFORMERS, *map(str, folders)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(found.stdout) <= 1.2


def _llama(layers: int):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    paths = [f"model.layers.{layer}.{linear}" for layer in range(layers) for linear in LINEARS]
    norms = [f"model.layers.{layer}.{at}_layernorm" for layer in range(layers)
             for at in ("input", "post_attention")]  # fmt: skip
    plain = {f"{norm}.weight": torch.ones(WIDTH) for norm in (*norms, "model.norm")}
    return config, paths, plain | {"model.embed_tokens.weight": torch.zeros(64, WIDTH)}


def _write_tall(folder, name: str, layers: int):
    config, paths, plain = _llama(layers)
    one = SAMPLES[name](96, WIDTH)
    tall = {key: _repeated(key, tensor, WIDTH // 96) for key, tensor in one.tensors.items()
            if tensor.dim()}  # fmt: skip
    module = Foreign(tall, one.w_hat, one.config, one.others, one.metadata)
    return foreign_files.write(folder, dict.fromkeys(paths, module), plain, config.to_dict())


def _write_gguf(folder, name: str, layers: int):
    gguf = pytest.importorskip("gguf")
    config, paths, plain = _llama(layers)
    folder.mkdir()
    config.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_head_count(4)
    blocks = np.zeros((WIDTH, WIDTH // 32 * 18), dtype=np.uint8)
    for path in (f"{path}.weight" for path in paths):
        writer.add_tensor(named(path), blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for path, tensor in plain.items():
        writer.add_tensor(named(path), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
