"""Text generation by transformers, compiled in place: every way to call it runs the compiled graphs."""

import warnings

import pytest
import torch
from transformers import pipeline
from transformers.models.llama.modeling_llama import LlamaMLP

import int8fx
from int8fx.testing.checked import checking
from int8fx.testing.toy_llama import of_one_layer, words

LINEARS = 7  # of the one layer; the head stays in float
PROMPT = torch.arange(1, 9).unsqueeze(0)
NEW = 5


@pytest.fixture
def eager_calls(monkeypatch):
    """Grows with each call of a layer that runs uncompiled."""
    calls = []
    forward = LlamaMLP.forward

    def noted(self, x):
        if not torch.compiler.is_compiling():
            calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", noted)
    torch._dynamo.reset()
    return calls


@pytest.fixture
def tokenizer():
    return words()


def generate(model, **options):
    return model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **options)


IN_PLACE = {
    "model.compile": lambda model: model.compile(backend="llmint8"),
    "model.forward": lambda model: setattr(
        model, "forward", torch.compile(model.forward, backend="llmint8")
    ),
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
@pytest.mark.parametrize("compile_", IN_PLACE.values(), ids=IN_PLACE)
def test_generate(eager_calls, compile_, beams, cache):
    model = of_one_layer()
    compile_(model)
    with checking() as seen, int8fx.collect_reports() as reports, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tokens = generate(model, num_beams=beams, cache_implementation=cache)
    assert tokens.shape == (1, PROMPT.shape[1] + NEW)
    assert not eager_calls
    assert seen.linears == NEW * LINEARS and seen.worst <= 1
    assert 2 <= len(reports) <= 4  # not a graph a step
    assert all(len(report.accepted) == LINEARS for report in reports)


def test_assisted_generation(eager_calls):
    model, assistant = of_one_layer(), of_one_layer(seed=1)
    model.compile(backend="llmint8")
    assistant.compile(backend="llmint8")
    with checking() as seen:
        tokens = generate(model, assistant_model=assistant)
    assert tokens.shape == (1, PROMPT.shape[1] + NEW)
    assert not eager_calls
    # One token at least is drafted, and one call at least checks it.
    assert seen.linears >= 2 * LINEARS and seen.linears % LINEARS == 0 and seen.worst <= 1


def test_a_pipeline_and_a_chat(eager_calls, tokenizer):
    model = of_one_layer()
    model.compile(backend="llmint8")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "w5 w6 w7"}]
    with checking() as seen:
        for prompt in ("w3 w4", chat):
            (answer,) = generator(prompt, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
            assert answer["generated_text"][: len(prompt)] == prompt
        chat_tokens = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        model.generate(**chat_tokens, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
    assert seen.linears == 3 * NEW * LINEARS and seen.worst <= 1
    assert not eager_calls


# --- what torch.compile returned ------------------------------------------------------------------


def test_generate_through_the_wrapper_says_that_it_runs_uncompiled(eager_calls):
    model = of_one_layer()
    wrapper = torch.compile(model, backend="llmint8")
    message = r"generate of LlamaForCausalLM runs uncompiled.*\n?.*model.compile\(backend=\"llmint8\"\)"
    with pytest.warns(UserWarning, match=message), int8fx.collect_reports() as reports:
        generate(wrapper)
    assert reports == [] and eager_calls
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # once is enough
        generate(wrapper)
    del wrapper


def test_a_wrapper_as_the_assistant_says_so_as_well():
    torch._dynamo.reset()
    model, assistant = of_one_layer(), torch.compile(of_one_layer(seed=1), backend="llmint8")
    with pytest.warns(UserWarning, match="generate of LlamaForCausalLM runs uncompiled"):
        generate(model, assistant_model=assistant)


@pytest.mark.parametrize("backend", ["eager", int8fx.llmint8], ids=["another", "a function"])
def test_whose_wrapper_it_is(backend):
    torch._dynamo.reset()
    other = torch.compile(of_one_layer(seed=1), backend="llmint8")
    wrapper = torch.compile(of_one_layer(), backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(wrapper)
    messages = [str(each.message) for each in caught]
    told = any("runs uncompiled" in message for message in messages)
    assert told == (backend is int8fx.llmint8)
    del other


def test_a_float_model_beside_a_compiled_one_generates_in_silence():
    torch._dynamo.reset()
    compiled = of_one_layer()
    compiled.compile(backend="llmint8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(of_one_layer())
