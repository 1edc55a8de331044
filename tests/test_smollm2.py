"""The real model, where the demo has left it: what is saved and loaded says the same, to the last
digit.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import int8fx
from int8fx import Int8Weight, smollm2
from int8fx.evaluate import sample_text
from int8fx.integrations.transformers import Int8FxConfig

PATH = smollm2.cache_directory() / smollm2.CONVERTED
pytestmark = pytest.mark.skipif(not PATH.is_dir(), reason="int8fx demo has not fetched it here")


def perplexity(model):
    """Of the first words of the sample text."""
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    tokens = torch.tensor(tokenizer(sample_text()[:1000])["input_ids"][:129]).unsqueeze(0)
    assert tokens.shape == (1, 129)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return math.exp(F.cross_entropy(logits[0].double(), tokens[0, 1:]))


@pytest.fixture(scope="module")
def int8():
    model = AutoModelForCausalLM.from_pretrained(PATH, quantization_config=Int8FxConfig()).eval()
    assert sum(isinstance(parameter, Int8Weight) for parameter in model.parameters()) == 210
    return model


def test_perplexity_after_save_pretrained_and_from_pretrained(int8, tmp_path):
    int8.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = perplexity(int8)
    assert 1 < expected < 100  # it is the model, and English
    assert perplexity(read) == expected


def test_perplexity_after_a_float_model_is_quantised_and_loads_the_state_dict(int8):
    read = AutoModelForCausalLM.from_pretrained(PATH).eval()
    assert perplexity(read) != perplexity(int8)
    int8fx.quantize_(read).load_state_dict(int8.state_dict())
    assert perplexity(read) == perplexity(int8)


def test_perplexity_after_a_checkpoint_is_loaded_on_meta(int8, tmp_path):
    int8fx.save_checkpoint(int8, tmp_path / "checkpoint")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PATH)).eval()
    read = int8fx.load_checkpoint(int8fx.quantize_(empty), tmp_path / "checkpoint")
    # What no checkpoint holds: the inverse frequencies.
    rotary = type(read.model.rotary_emb)(read.config)
    read.model.rotary_emb = rotary
    assert perplexity(read) == perplexity(int8)
