"""Each reader against the owner's own code: what it writes is read, and de-quantised to the same bits.

A package that is missing skips its tests: none of them is needed to read its files.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from int8fx.testing import foreign_files
from int8fx.weights.readers import table
from int8fx.weights.readers.loading import Checkpoint
from int8fx.weights.readers.opening import opened

N, K = 96, 256


def weight(dtype=torch.float32, n: int = N, k: int = K) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


def read(folder, tensors, config=None, metadata=None, shape=(N, K), others=()):
    """What int8fx reads of one module, whose tensors the owner gave."""
    named = {f"up.{name}": each.detach().clone().contiguous() for name, each in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata or {})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    for name, said in others:
        (folder / name).write_text(json.dumps(said))
    container = opened(folder)
    return Checkpoint.of(container, table.reader_of(container)).read("up", shape)


# --- bitsandbytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind, nested, dtype, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=dtype, quant_type=kind, compress_statistics=nested
    )
    linear.weight = bnb.nn.Params4bit(
        weight(dtype), requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    linear = linear.to("cpu")
    neutral = read(tmp_path, linear.state_dict(), {"quant_method": "bitsandbytes"})
    theirs = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(neutral.dequantized(theirs.dtype), theirs)


def test_bitsandbytes_int8(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(
        weight(torch.float16), requires_grad=False, has_fp16_weights=False
    )
    linear = linear.to("cpu")
    state = linear.state_dict()
    neutral = read(tmp_path, state, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert torch.equal(neutral.codes, state["weight"])
    theirs = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    # theirs multiplies by a constant near 1 / 127, ours divides by it
    assert torch.allclose(neutral.dequantized(), theirs.float(), rtol=1e-6, atol=0)


# --- GGUF ------------------------------------------------------------------------------------------


def gguf_rows(gguf, kind: str) -> np.ndarray:
    """Blocks of random bytes, whose 16-bit floats are small numbers."""
    quantization = getattr(gguf.GGMLQuantizationType, kind)
    if kind in ("Q8_0", "Q4_0", "Q4_1"):
        return gguf.quants.quantize(weight().numpy(), quantization)
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    rows = np.random.default_rng(0).integers(0, 256, (N, K // block, size), dtype=np.uint8)
    floats = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in floats:
        values = np.random.default_rng(at).uniform(-0.01, 0.01, (N, K // block)).astype(np.float16)
        rows[:, :, at : at + 2] = values[..., None].view(np.uint8)
    return rows.reshape(N, -1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_gguf(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    rows, quantization = gguf_rows(gguf, kind), getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_array("tokenizer.tokens", ["a", "bc", "ü"])
    writer.add_tensor("blk.0.ffn_up.weight", rows, raw_dtype=quantization)
    writer.add_tensor("output_norm.weight", np.arange(K, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    container = opened(tmp_path / "model.gguf")
    assert container.metadata["tokenizer.tokens"] == ["a", "bc", "ü"]
    assert torch.equal(container.tensor("output_norm.weight"), torch.arange(K, dtype=torch.float32))
    neutral = Checkpoint.of(container, table.reader_of(container)).read("blk.0.ffn_up", (N, K))
    theirs = torch.from_numpy(gguf.quants.dequantize(rows, quantization))
    assert torch.equal(neutral.dequantized(), theirs)


# --- compressed-tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "strategy", "symmetric", "packed"),
    [
        (4, "group", True, True),
        (4, "group", False, True),
        (3, "group", False, True),
        (8, "channel", True, True),
        (8, "channel", False, True),
        (8, "channel", True, False),
        (8, "channel", False, False),
        (8, "tensor", True, False),
    ],
)
def test_compressed_tensors(bits, strategy, symmetric, packed, tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    group = 64 if strategy == "group" else None
    args = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    activations = quantization.QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=None if packed else activations
    )
    floats = weight(torch.bfloat16)
    groups = floats.unflatten(1, (-1, group or K)) if strategy != "tensor" else floats.reshape(1, 1, -1)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale, zero = quantization.utils.calculate_qparams(low, high, args)
    state = {"weight": floats, "weight_scale": scale, "weight_zero_point": zero}
    if strategy == "tensor":
        state |= {"weight_scale": scale.view(1), "weight_zero_point": zero.view(1)}
    form = "pack-quantized" if packed else "int-quantized"
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    theirs = compressor.decompress(stored, scheme)["weight"]
    config = json.loads(
        quantization.QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, quantization_status="compressed"
        ).model_dump_json()
    )
    neutral = read(tmp_path, stored, config)
    assert torch.equal(neutral.dequantized(torch.bfloat16), theirs)


# --- quanto ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quanto(bits, dtype, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
    model[0].weight.data.copy_(weight(dtype))
    quanto.quantize(model, weights=f"qint{bits}")
    quanto.freeze(model)
    theirs = model[0].weight.dequantize().detach()
    state = {name.removeprefix("0."): tensor for name, tensor in model.state_dict().items()}
    said = {"up": {"weights": f"qint{bits}", "activations": "none"}}
    neutral = read(tmp_path, state, others=[("quanto_qmap.json", said)])
    assert torch.equal(neutral.dequantized(dtype), theirs)


# --- torchao ---------------------------------------------------------------------------------------


def torchao_file(config):
    torchao = pytest.importorskip("torchao")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = nn.ModuleDict({"up": nn.Linear(K, N, bias=False, dtype=torch.bfloat16)})
    model["up"].weight.data.copy_(weight(torch.bfloat16))
    torchao.quantize_(model, config(torchao.quantization))
    tensors, metadata = flatten_tensor_state_dict(
        {name: each.detach() for name, each in model.state_dict().items()}
    )
    own = {name.removeprefix("up."): tensor for name, tensor in tensors.items()}
    return own, metadata, model["up"].weight.dequantize().detach()


@pytest.mark.parametrize(
    "config",
    [
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=q.PerAxis(0)),
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=q.PerGroup(64)),
        lambda q: q.Int8WeightOnlyConfig(version=2),
    ],
    ids=["int4", "int8-channel", "int3", "int8"],
)
def test_torchao(config, tmp_path):
    tensors, metadata, theirs = torchao_file(config)
    neutral = read(tmp_path, tensors, {"quant_method": "torchao"}, metadata)
    assert torch.equal(neutral.dequantized(torch.bfloat16), theirs)


# --- HQQ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_hqq(bits, axis, tmp_path):
    hqq = pytest.importorskip("hqq.core.quantize")
    linear = nn.Linear(K, N, bias=False, dtype=torch.float16)
    linear.weight.data.copy_(weight(torch.float16))
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    config["weight_quant_params"]["optimize"] = False  # which needs no calibration, but a GPU's time
    layer = hqq.HQQLinear(
        linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False, initialize=True
    )
    state = {name: each for name, each in layer.state_dict().items() if isinstance(each, torch.Tensor)}
    neutral = read(tmp_path, state, {"quant_method": "hqq"})
    assert torch.equal(neutral.dequantized(torch.float16), layer.dequantize())


# --- ComfyUI ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 64, 256])
def test_comfyui(block, tmp_path):
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    if block:
        codes, scale = eager.quantize_int8_convrot_weight(weight(), block)
        theirs = eager.dequantize_int8_convrot_weight(codes, scale, block)
    else:
        codes, scale = eager.quantize_int8_rowwise(weight())
        theirs = eager.dequantize_int8_simple(codes, scale)
    foreign = foreign_files.comfyui(codes, scale, block)
    neutral = read(tmp_path, foreign.tensors)
    if not block:
        assert torch.equal(neutral.dequantized(), theirs)
        return
    # A rotation in fp32 by butterflies, and one by a matrix.
    bound = 2 * block * 2**-24 * (codes.abs().float() * scale.view(-1, 1)).amax()
    assert (neutral.dequantized() - theirs).abs().max() <= bound


# --- AWQ ----------------------------------------------------------------------------------------


def test_awq_by_gptqmodels_packing(tmp_path):
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    given = foreign_files.numbers(N, K, 4, 64)
    qweight, qzeros = packing.pack_awq(given.codes.t().int(), given.zero_point.t().int(), 4)
    scales = given.scale.t().contiguous()
    theirs = packing.dequantize_gemm(qweight, qzeros, scales, 4, 64).t()
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    neutral = read(tmp_path, {"qweight": qweight, "qzeros": qzeros, "scales": scales}, config)
    assert torch.equal(neutral.dequantized(torch.float16), theirs)
