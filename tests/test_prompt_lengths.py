"""Prompt after prompt of other lengths: two graphs, the tokens of eager mode, and a model as it was."""

import copy
import threading

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, T5Config, T5ForConditionalGeneration

import int8fx
from int8fx.integrations.prompt_lengths import lengths_vary, mark
from int8fx.testing.toy_llama import of_one_layer

PROMPTS = (8, 13, 40, 5)
NEW = 6
NAME = "prepare_inputs_for_generation"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def prompt(length: int) -> torch.Tensor:
    return (torch.arange(1, length + 1) % 60).unsqueeze(0)


def generate(model, length: int, **options) -> list[int]:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    return model.generate(prompt(length), **options)[0].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_two_graphs_serve_all_lengths(options):
    compiled, eager = of_one_layer(), of_one_layer()
    int8fx.quantize_(eager, scheme="llm.int8")
    expected = [generate(eager, length, **options) for length in PROMPTS]
    compiled.compile(backend="llmint8")
    with int8fx.collect_reports() as reports:
        assert [generate(compiled, length, **options) for length in PROMPTS] == expected
    assert len(reports) == 2


def test_a_prompt_of_embeddings():
    model = of_one_layer()
    model.compile(backend="llmint8")
    with int8fx.collect_reports() as reports:
        for length in PROMPTS:
            embeddings = model.get_input_embeddings()(prompt(length))
            model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)
    assert len(reports) == 2


@pytest.mark.parametrize(
    "request_",
    [{"backend": "llmint8", "dynamic": False}, {"backend": "eager"}],
    ids=["sizes that the user wants fixed", "another backend"],
)
def test_what_is_left_alone(request_):
    model = of_one_layer()
    model.compile(**request_)
    with lengths_vary(model, int8fx.llmint8):
        assert NAME not in vars(model)


def test_a_compiled_forward_is_a_compiled_model():
    model = of_one_layer()
    model.forward = torch.compile(model.forward, backend="llmint8")
    with int8fx.collect_reports() as reports:
        for length in PROMPTS:
            generate(model, length)
    assert len(reports) == 2


def test_the_model_is_as_it_was_afterwards():
    model = of_one_layer()
    model.compile(backend="llmint8")
    before = set(vars(model))
    generate(model, 8)
    assert set(vars(model)) == before
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(prompt(8), max_new_tokens=-1)
    assert set(vars(model)) == before
    copied = copy.deepcopy(model)
    assert generate(copied, 8) == generate(model, 8)


def test_what_the_user_put_there_stays():
    model = of_one_layer()
    model.compile(backend="llmint8")
    prepare, calls = model.prepare_inputs_for_generation, []

    def own(*args, **kwargs):
        calls.append(args)
        return prepare(*args, **kwargs)

    setattr(model, NAME, own)
    generate(model, 8)
    assert len(calls) == NEW and vars(model)[NAME] is own


def test_two_threads_generate_at_a_time():
    model = of_one_layer()
    model.compile(backend="llmint8")
    expected = [generate(model, length) for length in PROMPTS]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda length=length: found.update({length: generate(model, length)}))
        for length in PROMPTS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[length] for length in PROMPTS] == expected
    assert NAME not in vars(model)


def test_a_window_and_a_static_cache_keep_their_sizes():
    shapes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    config = MistralConfig(num_hidden_layers=2, num_key_value_heads=2, sliding_window=8, **shapes)
    torch.manual_seed(0)
    compiled = MistralForCausalLM(config).eval()
    eager = copy.deepcopy(compiled)
    int8fx.quantize_(eager, scheme="llm.int8")
    compiled.compile(backend="llmint8")
    for options in ({}, {"cache_implementation": "static"}):
        for length in (5, 12):
            assert generate(compiled, length, **options) == generate(eager, length, **options)


def test_an_encoder_and_a_decoder():
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    compiled = T5ForConditionalGeneration(config).eval()
    eager = copy.deepcopy(compiled)
    int8fx.quantize_(eager, scheme="llm.int8")
    compiled.compile(backend="llmint8")
    for length in PROMPTS:
        assert generate(compiled, length) == generate(eager, length)


def test_a_cache_holds_what_it_held():
    class Layer:
        keys = torch.randn(1, 5, 2, 16).transpose(1, 2)
        values = torch.randn(1, 5, 2, 16).transpose(1, 2)

    class Cache:
        layers = (Layer(),)

    keys = Layer.keys.clone()
    cache = Cache()
    mark({"past_key_values": cache, "input_ids": prompt(1), "attention_mask": None})
    (layer,) = cache.layers
    assert layer.keys.is_contiguous() and layer.values.is_contiguous()
    assert torch.equal(layer.keys, keys)
