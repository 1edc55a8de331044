"""vLLM's greedy answers beside those of int8fx in transformers."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import int8fx
from int8fx.testing import serving

TOKENS = 64


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled"])
def test_greedy_tokens_are_those_of_transformers(model, enforce_eager):
    """After the same words transformers chooses the same token. In fp32: a bf16 model of random weights
    has logits so close to each other that a last bit decides."""
    prompts = serving.random_prompts(8, random.Random(2))
    options = {"quant_method": "int8fx", "decomposition": "token"}
    settings = {"hf_overrides": {"quantization_config": options}, "enforce_eager": enforce_eager}
    with serving.engine(model, **settings, dtype="float32") as llm:
        answers = serving.answers(llm, prompts, TOKENS)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    int8fx.quantize_(loaded, decomposition="token")
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
