"""SmolLM2 in every form that vLLM serves: its greedy answers beside those of transformers.

``pytest -s`` prints the table.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import int8fx
from int8fx.testing import serving

TOKENS = 64
TOKEN = {"decomposition": "token"}
ONLINE = {"hf_overrides": {"quantization_config": {"quant_method": "int8fx", **TOKEN}}}
# Which files, what vLLM is given, and what int8fx.quantize_ is given in transformers (None: bf16).
FORMS = {
    "bf16": ("bf16", {}, None),
    "int8fx online": ("bf16", ONLINE, TOKEN),
    "int8fx files": ("int8fx", {}, TOKEN),
    "compressed-tensors W8A8": ("compressed-tensors", {}, {"scheme": "absmax-vector"}),
    "bitsandbytes int8": ("bitsandbytes", {}, {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return serving.in_every_form(serving.smollm2(), tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def prompts(files):
    tokenizer = AutoTokenizer.from_pretrained(files["bf16"])
    return [tokenizer(text).input_ids for text in serving.PROMPTS]


def one_by_one(files, prompts, settings, dtype):
    """A request at a time: the column decomposition is of a whole batch."""
    with serving.engine(files, **settings, dtype=dtype) as llm:
        return [serving.answers(llm, [prompt], TOKENS)[0] for prompt in prompts]


def step_by_step(model, prompt, answer):
    """How far each token is below the largest logit after the same words, in the steps of generation:
    the prompt, then a token at a time."""
    found, words, cache = [], torch.tensor([prompt]), None
    for token in answer:
        with torch.no_grad():
            output = model(words, past_key_values=cache, use_cache=True)
        logits = output.logits[0, -1].float()
        found.append(logits.amax() - logits[token])
        words, cache = torch.tensor([[token]]), output.past_key_values
    return torch.stack(found)


def noise(files, prompts, answers, options):
    """The largest change of a logit in transformers alone where its attention sums in another order."""
    texts = [
        torch.tensor([[*prompt, *answer]]) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    logits = []
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            files["bf16"], dtype=torch.float32, attn_implementation=attention
        )
        int8fx.quantize_(model, **options)
        with torch.no_grad():
            logits.append([model(text).logits for text in texts])
    return max((one - other).abs().max() for one, other in zip(*logits, strict=True))


def compare(files, prompts, form, dtype):
    """``gaps`` of each answer, ``[8, 64]``, as lines of the table; and the answers."""
    stored, settings, options = FORMS[form]
    answers = one_by_one(files[stored], prompts, settings, dtype)
    model = AutoModelForCausalLM.from_pretrained(files["bf16"], dtype=getattr(torch, dtype))
    if options is not None:
        int8fx.quantize_(model, **options)
    tokens = [[token for token, _ in answer] for answer in answers]
    gaps = torch.stack([step_by_step(model, *pair) for pair in zip(prompts, tokens, strict=True)])
    whole, same = int((gaps == 0).all(1).sum()), int((gaps == 0).sum())
    print(
        f"\n| {form} | {dtype} | {whole} of {len(gaps)} answers | {same} of {gaps.numel()} tokens | "
        f"others at most {gaps.amax():.4f} below |"
    )
    for prompt, row in zip(serving.PROMPTS, gaps, strict=True):
        places = [f"token {i + 1}: {row[i]:.4f}" for i in row.nonzero().flatten().tolist()]
        print(f"    {prompt!r}: {', '.join(places) or 'the same'}")
    return gaps, tokens


@pytest.mark.parametrize("form", [form for form in FORMS if form != "bf16"])
def test_greedy_answers_are_those_of_transformers(files, prompts, form):
    """In fp32 engines differ in the order of their sums alone. A value that rounds to another integer
    moves others over their boundary, layer by layer: transformers is as far from itself."""
    gaps, tokens = compare(files, prompts, form, "float32")
    assert gaps.shape == (len(serving.PROMPTS), TOKENS)
    assert (gaps == 0).float().mean() > 0.9
    assert gaps.amax() < noise(files, prompts, tokens, FORMS[form][2])


@pytest.mark.parametrize("form", FORMS)
def test_greedy_answers_in_bf16(files, prompts, form):
    """vLLM adds and normalises in fp32 where transformers rounds to bf16 in between: without int8 two
    logits may change places that are two roundings of bf16 apart, and int8 rounds on from there."""
    gaps, _ = compare(files, prompts, form, "bfloat16")
    assert (gaps == 0).float().mean() > 0.9
