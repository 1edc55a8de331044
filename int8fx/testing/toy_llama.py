"""Llamas of random weights, and a tokenizer of theirs."""

from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def llama(layers: int, **config) -> LlamaForCausalLM:
    """A random Llama; by default with the shapes of SmolLM2-135M's linears."""
    shapes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shapes | config)).eval()


def tiny(layers: int = 2, **config) -> LlamaForCausalLM:
    shapes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return llama(layers, **shapes | config)


def of_one_layer(seed: int = 0) -> LlamaForCausalLM:
    """With a vocabulary of 64 words, and no token that ends a text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 64 words, w0 to w63, with a chat's template."""
    vocabulary = {f"w{index}": index for index in range(64)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=split, unk_token="w0", eos_token="w63")
    made.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    return made


def saved_model(directory: Path) -> LlamaForCausalLM:
    """``tiny`` and a tokenizer of its 128 words, as files."""
    model = tiny()
    model.save_pretrained(directory)
    vocabulary = {f"w{index}": index for index in range(128)}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=split, unk_token="w0").save_pretrained(directory)
    return model
