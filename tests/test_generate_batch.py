"""transformers' continuous batching on int8 weights: ``generate_batch``."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import int8fx
from int8fx.testing import serving

batching = pytest.importorskip("transformers.generation.configuration_utils")
PROMPTS = [[1, 2, 3, 4], list(range(5, 40)), [7, 8]]


@pytest.fixture
def model(tmp_path):
    """Of files, as the one that it is compared with: those keep the rotary frequencies in fp32."""
    torch.compiler.reset()
    files = serving.save(serving.tiny_llama(), tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(files, dtype=torch.bfloat16)
    return int8fx.quantize_(loaded, decomposition="token").requires_grad_(False)


def answer(model, **settings):
    config = batching.ContinuousBatchingConfig(
        max_batch_tokens=64, num_blocks=64, page_size=16, **settings
    )
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(
        inputs=PROMPTS,
        generation_config=greedy,
        continuous_batching_config=config,
        progress_bar=False,
    )
    return [list(outputs[name].generated_tokens) for name in sorted(outputs)]


def test_every_linear_is_compiled(model):
    """Around the paged attention, which transformers leaves to run eagerly."""
    expected = answer(model)
    compile_config = batching.CompileConfig(backend="llmint8", mode="default", dynamic=True)
    with int8fx.collect_reports() as reports:
        compiled = answer(model, varlen_compile_config=compile_config)
    decisions = [decision for report in reports for decision in report.decisions]
    # Layers share graphs: a path is that of the first.
    accepted = {each.path.rpartition(".")[2] for each in decisions if each.accepted}
    refused = {each.path for each in decisions if not each.accepted}
    assert (accepted, refused) == (set(serving.LINEARS), {"lm_head"})
    # Later ones may differ, where a rounding of the compiled code chooses another word.
    assert [tokens[0] for tokens in compiled] == [tokens[0] for tokens in expected]


def test_files_in_int8_answer_as_the_model_that_wrote_them(model, tmp_path):
    model.save_pretrained(tmp_path / "int8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16)
    assert answer(loaded) == answer(model)
