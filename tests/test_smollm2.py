"""The real model, where the demo has left it: what is saved and loaded says the same, to the last
digit.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import int8fx
from int8fx import Int8Weight, smollm2
from int8fx.integrations.transformers import Int8FxConfig

PATH = smollm2.cache_directory() / smollm2.CONVERTED
pytestmark = pytest.mark.skipif(not PATH.is_dir(), reason="int8fx demo has not fetched it here")


def perplexity(model):
    tokens = torch.randint(0, 49152, (1, 65), generator=torch.Generator().manual_seed(0))
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
