"""The real model, where the demo has left it: what is saved and loaded says the same, to the last
digit; explain names its linears; and the schemes come in the paper's order.
"""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import int8fx
from int8fx import Int8Weight
from int8fx.analysis.evaluate import (
    FLOAT,
    Settings,
    contender,
    evaluate,
)
from int8fx.analysis.metrics import sample_text
from int8fx.bench import smollm2
from int8fx.integrations.transformers import Int8FxConfig
from int8fx.testing.hand_counts import assert_counted_by_hand

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


def test_explain_names_the_210_linears_and_the_head_and_its_totals_are_a_hand_count():
    model = AutoModelForCausalLM.from_pretrained(PATH).eval()
    tokens = 8
    shown = int8fx.explain(model, torch.arange(tokens)[None], use_cache=False)
    assert_counted_by_hand(shown, tokens, vocabulary=49152)
    # 30 layers of 3,538,944 in their linears, an embedding for the head as well, and 61 norms.
    parameters = 30 * 3_538_944 + 49152 * 576 + 61 * 576
    assert parameters == 134_515_008 == sum(each.numel() for each in model.parameters())
    buffers = sum(each.nbytes for each in model.buffers())
    assert shown.totals.model_bytes == 4 * parameters + buffers
    assert (len(shown.graph_breaks), len(shown.recompiles), shown.graphs) == (0, 0, 1)


def test_the_papers_ordering_and_what_outliers_do_to_it():
    """Table 1 and section 4, as in the README, where each factor is half as large again or more."""
    model = AutoModelForCausalLM.from_pretrained(PATH).eval()
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    token_ids = torch.tensor(tokenizer(sample_text())["input_ids"])
    names = ("absmax-tensor", "absmax-row", "absmax-vector", "llm.int8")
    settings = Settings({name: contender(name) for name in names}, windows=2, length=256, factor=30.0)
    outcome = evaluate(model, token_ids, settings, "SmolLM2", Console(file=io.StringIO()))
    kl = {name: outcome.accuracies[name].mean_kl for name in names}
    injected = {name: outcome.injected[name].mean_kl for name in names}
    for divergence in (kl, injected):
        tensor, row, vector, llm_int8 = (divergence[name] for name in names)
        assert tensor > 4 * row and row > 1.5 * vector and vector > 1.2 * llm_int8
    assert injected["absmax-vector"] > 2 * kl["absmax-vector"]
    assert injected["absmax-vector"] > 3 * injected["llm.int8"]
    assert injected["llm.int8"] < 1.6 * kl["llm.int8"]
    for scores in (outcome.accuracies, outcome.injected):
        perplexity = scores[FLOAT].perplexity
        assert scores["llm.int8"].perplexity == pytest.approx(perplexity, rel=0.05)
        assert scores["absmax-tensor"].perplexity > 1.5 * perplexity
