"""A Llama of transformers as a GGUF file with weights in 8 or 4 bits, without a tokenizer."""

from pathlib import Path

import gguf
import numpy
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

# llama.cpp's names of a layer's weights
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model_folder: Path, target: Path, bits: str) -> None:
    """
    Args:
        bits: ``Q8_0`` or ``Q4_0``; the embedding of a 4-bit file has 8, as llama.cpp's own files have.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(target, "llama")
    _settings(writer, model.config)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        _add(writer, _name(name), _as_llama_cpp(name, tensor, model.config).numpy(), bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _name(name: str) -> str:
    path, _, kind = name.rpartition(".")
    if path in OUTSIDE:
        return f"{OUTSIDE[path]}.{kind}"
    _, _, layer, inner = path.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def _as_llama_cpp(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """llama.cpp rotates pairs of neighbours, transformers halves: the rows of q and k change places."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _add(writer: gguf.GGUFWriter, name: str, tensor: numpy.ndarray, bits: str) -> None:
    if tensor.ndim == 1:
        return writer.add_tensor(name, tensor)
    bits = "Q8_0" if name in ("token_embd.weight", "output.weight") else bits
    kind = gguf.GGMLQuantizationType[bits]
    writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
