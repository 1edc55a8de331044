"""vLLM's greedy answers beside those of int8fx in transformers."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import int8fx
from int8fx.testing import serving

TOKENS = 64


TOKEN = {"decomposition": "token"}
STATIC = {"decomposition": "static"}
ROTATED = {"scheme": "int8-rotated"}


@pytest.mark.parametrize(
    ("options", "kinds", "enforce_eager"),
    [
        (TOKEN, {}, True),
        (TOKEN, {}, False),
        (STATIC, {}, False),
        (ROTATED, {}, False),
        (TOKEN, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, False),
    ],
    ids=["eager", "compiled", "static", "int8-rotated", "biases, untied"],
)
def test_greedy_tokens_are_those_of_transformers(tmp_path, options, kinds, enforce_eager):
    """After the same words transformers chooses the same token. In fp32: a bf16 model of random weights
    has logits so close to each other that a last bit decides."""
    model = serving.tiny_llama(**kinds)
    files = serving.save(model, tmp_path / "model")
    if options is not TOKEN:
        # The head stays in float on both sides: quantize_ has an embedding's in float, the backend not.
        file = serving.calibrated(model, tmp_path / "calibration.json")
        options = {**options, "calibration": str(file), "skip": ["lm_head"]}
    prompts = serving.random_prompts(8, random.Random(2))
    given = {"quantization_config": {"quant_method": "int8fx", **options}}
    settings = {"hf_overrides": given, "enforce_eager": enforce_eager}
    with serving.engine(files, **settings, dtype="float32") as llm:
        answers = serving.answers(llm, prompts, TOKENS)
    loaded = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32)
    int8fx.quantize_(loaded, **options)
    gaps = [
        serving.gaps(loaded, prompt, [token for token, _ in answer])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    every = torch.cat(gaps)
    assert len(every) == 8 * TOKENS
    print(f"{int((every == 0).sum())} of {len(every)} the same, others at most {every.amax()} below")
    # A value that rounds to another integer in one engine moves a logit by a step of its scale.
    assert (every == 0).float().mean() > 0.99
    assert every.amax() < 0.05
