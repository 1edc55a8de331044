"""int8fx evaluate: schemes side by side on a random Llama, and the injected outliers."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from int8fx.analysis.evaluate import (
    FLOAT,
    Settings,
    contender,
    evaluate,
    logits_of,
    quantized,
)
from int8fx.analysis.metrics import compare, windows
from int8fx.analysis.outlier_injection import inject, inject_and_check
from int8fx.errors import UserError
from int8fx.testing.toy_llama import tiny
from int8fx.weights.store import WeightStore

QUIET = Console(file=io.StringIO())


@pytest.fixture
def token_ids():
    return torch.randint(0, 128, (70,), generator=torch.Generator().manual_seed(1))


def test_schemes_and_injected_outliers_in_two_tables(token_ids):
    model = tiny()
    specs = ("absmax-tensor", "absmax-vector", "llm.int8", "llm.int8,threshold=2", "w8a16")
    settings = Settings({spec: contender(spec) for spec in specs}, windows=2, length=32, factor=30.0)
    outcome = evaluate(model, token_ids, settings, "tiny", QUIET)
    assert list(outcome.accuracies) == list(outcome.injected) == [FLOAT, *specs]
    for scores in (outcome.accuracies, outcome.injected):
        assert scores[FLOAT].mean_kl == 0 and scores[FLOAT].top1 == 1
        assert all(0 < scores[spec].mean_kl < 1 for spec in specs)
    # fp32 does not see the injection, a product without decomposition does.
    assert outcome.injected[FLOAT].perplexity == pytest.approx(
        outcome.accuracies[FLOAT].perplexity, rel=1e-5
    )
    injected = {spec: outcome.injected[spec].mean_kl for spec in specs}
    assert injected["absmax-vector"] > 2 * injected["llm.int8"]
    assert injected["absmax-vector"] > 2 * outcome.accuracies["absmax-vector"].mean_kl
    assert len(outcome.channels) == 6

    console = Console(file=io.StringIO(), width=80)
    console.print(outcome)
    text = console.file.getvalue()
    assert "tiny, 2 windows of 32 tokens" in text and "6 channels of every norm x30" in text
    assert "…" not in text and all(f" {spec} " in text for spec in specs)
    assert json.loads(json.dumps(outcome.to_dict()))["accuracies"]["w8a16"]["top1"] <= 1


def test_without_inductor_and_with_it_are_the_same_arithmetic(token_ids):
    model, token_windows = tiny(1), windows(token_ids, 32, 1)
    # Random logits are nearly all the same, and their divergences are the rounding of softmax.
    model.lm_head.weight.data.mul_(50)
    options, store = contender("llm.int8"), WeightStore()
    eager, compiled = (quantized(model, options, store, compiled) for compiled in (False, True))
    scores = compare(eager, {"compiled": compiled, "float": logits_of(model)}, token_windows)
    # A flipped rounding spreads, but far less than int8 itself costs.
    assert scores["compiled"].mean_kl < 0.2 * scores["float"].mean_kl


def test_more_schemes_than_dynamo_recompiles(token_ids):
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(128, 32), nn.Linear(32, 128)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.fc(self.embed(input_ids)))

    model, token_windows, store = Bigram(), windows(token_ids, 32, 1), WeightStore()
    for threshold in range(1, 11):
        spec = contender(f"llm.int8,threshold={threshold}")
        assert quantized(model, spec, store, False)(token_windows).isfinite().all()


def test_injection_leaves_float_alone_and_says_which_channels(token_ids):
    model = tiny()
    before = model.model.layers[1].input_layernorm.weight.clone()
    channels = inject_and_check(model, 30.0, 7, logits_of(model), token_ids[:32])
    changed = model.model.layers[1].input_layernorm.weight / before
    assert changed.nonzero().numel() == 32
    assert (changed == 30).nonzero().flatten().tolist() == channels


def test_injection_needs_llamas_blocks():
    with pytest.raises(UserError, match=r"Llama's blocks.*this is a Linear"):
        inject(nn.Linear(2, 2), 30.0, 0)


def test_injection_that_bf16_sees_is_refused(token_ids):
    model = tiny().to(torch.bfloat16)
    logits = logits_of(model)
    with pytest.raises(UserError, match="it is for models in float32"):
        # Logits of the size that a trained model has.
        inject_and_check(model, 1e4, 0, lambda ids: 100 * logits(ids), token_ids[:32])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("int9", ["int9", "'llm.int8'", "'w8a16'"]),
        ("w8a16,threshold=3", ["'threshold=3'", "allowed: none"]),
        ("llm.int8,threshold", ["'threshold'", "threshold=..."]),
        ("llm.int8,threshold=-1", ["'threshold'", "-1", ">= 0"]),
        ("llm.int8,decomposition=row", ["'row'", "'column' or 'token'"]),
    ],
)
def test_a_wrong_scheme_is_named(spec, words):
    with pytest.raises(UserError) as raised:
        contender(spec)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_text_that_is_too_short(token_ids):
    settings = Settings({}, windows=9, length=32)
    with pytest.raises(UserError, match="9 windows of 32 tokens were asked for; the text has 2"):
        evaluate(tiny(1), token_ids, settings, "tiny", QUIET)
