"""The demo's contenders on a random Llama, and the table that people read."""

import io

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from int8fx.analysis.metrics import Accuracy
from int8fx.bench.contenders import (
    Contender,
    Speed,
    in_bfloat16,
    line_up,
    measure,
    weight_bytes,
)
from int8fx.bench.models import quiet_transformers
from int8fx.cli import demo
from int8fx.compiler.report import Report
from int8fx.errors import UserError
from int8fx.torch_private import compile_counts

CAPACITY = 24


def ignore(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def traced(model) -> Contender:
    """Compiled by Dynamo alone: what is counted here is graphs, and Inductor adds none."""
    torch._dynamo.reset()
    return Contender(
        "traced", "", model, torch.compile(model, backend="eager", dynamic=False), CAPACITY
    )


def test_logits_are_those_of_the_model(model, token_ids):
    contender = Contender("eager", "", model, model, CAPACITY)
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
    # Twice: the second time, the cache was used before.
    for _ in range(2):
        torch.testing.assert_close(contender.logits(token_ids), expected, rtol=1e-4, atol=1e-5)


def test_generate_is_greedy_decoding(model, token_ids):
    contender = Contender("eager", "", model, model, CAPACITY)
    expected = model.generate(token_ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    prompt = token_ids[0].tolist()
    generated = contender.generate(prompt, 8, stop=[], on_token=ignore)
    assert prompt + generated == expected[0].tolist()


def test_generate_ends_at_a_stop_token(model, token_ids):
    contender = Contender("eager", "", model, model, CAPACITY)
    prompt = token_ids[0].tolist()
    free = contender.generate(prompt, 8, stop=[], on_token=ignore)
    stopped = contender.generate(prompt, 8, stop=[free[3]], on_token=ignore)
    assert stopped == free[: free.index(free[3])]


def test_two_graphs_serve_everything(traced, token_ids):
    traced.warm_up(token_ids, ignore)
    assert (traced.graphs, traced.graph_breaks) == (2, 0)
    before = compile_counts()
    measure([traced], token_ids, rounds=2, steps=4, on_round=ignore)
    traced.logits(token_ids)
    traced.generate([1, 2, 3], 4, stop=[], on_token=ignore)
    assert compile_counts() == before


def test_weight_bytes_count_a_shared_weight_once(model):
    tied = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True}))
    shared = tied.lm_head.weight
    assert shared is tied.model.embed_tokens.weight
    assert weight_bytes(model, None) - weight_bytes(tied, None) == shared.nbytes


def test_weight_bytes_of_int8(model):
    report = Report((), {}, "", "", quantizations=0, float_bytes=4096, int8_bytes=1024 + 128)
    assert weight_bytes(model, report) == weight_bytes(model, None) - 4096 + 1024 + 128


def test_bf16_copy_leaves_the_rotary_frequencies(model):
    copied = in_bfloat16(model)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for (name, buffer), (_, original) in zip(
        copied.named_buffers(), model.named_buffers(), strict=True
    ):
        assert buffer.dtype == original.dtype, name


def test_llmint8_runs_on_the_model_as_loaded_and_in_bf16(model):
    def shown(model, **options) -> list[tuple[str, str]]:
        return [(each.name, each.how) for each in line_up(model, CAPACITY, options)]

    three = [("as loaded", "bf16, eager"), ("Inductor", "bf16"), ("llmint8", "int8 + bf16")]
    assert shown(in_bfloat16(model)) == three
    assert shown(model)[2:] == [("llmint8", "int8 + fp32"), ("llmint8 bf16", "int8 + bf16")]
    assert shown(model, scheme="w4a16-group")[2] == ("llmint8", "4-bit + fp32")
    rules = [("*.mlp.*", "w4a16-group")]
    assert shown(model, rules=rules)[3] == ("llmint8 bf16", "4-bit, int8 + bf16")


def test_the_cache_goes_by_the_name_that_forward_has(model, token_ids):
    given = []

    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids, cache=None, **more):
            given.append(cache)
            return super().forward(input_ids, past_key_values=cache, **more)

    renamed = Renamed(model.config).eval()
    Contender("eager", "", renamed, renamed, CAPACITY).logits(token_ids)
    assert None not in given and len(given) == 2


def test_table_fits_80_columns(model):
    contenders = [
        Contender("as loaded", "fp32, eager", model, model, CAPACITY),
        Contender("Inductor", "bf16", model, model, CAPACITY),
        Contender("llmint8", "int8 + fp32", model, model, CAPACITY),
        Contender("llmint8 bf16", "int8 + bf16", model, model, CAPACITY),
    ]
    names = [contender.name for contender in contenders]
    speeds = dict.fromkeys(names, Speed(prefill=123456.7, decode=1234.56))
    accuracies = dict.fromkeys(names, Accuracy(5110, 12345.678, 1.2345, 2.0, 3.0, 0.98765))
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.results("owner/a-model", contenders, speeds, accuracies))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for shown in ("owner/a-model", "123,457", "1,234.6", "12,345.68", "98.8%", "1.2345"):
        assert shown in text
    assert "…" not in text


class Tokenizer:
    """One token a character; chats are marked with a template."""

    eos_token_id = 2

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt) -> str:
        return f"<{turns[0]['role']}>{turns[0]['content']}"


def test_prompt_takes_the_chat_template_when_there_is_one():
    assert demo.encode_prompt(Tokenizer(), "hi") == list(map(ord, "hi"))
    assert demo.encode_prompt(Tokenizer("yes"), "hi") == list(map(ord, "<user>hi"))


def test_empty_prompt():
    with pytest.raises(UserError, match="--prompt ' ' is empty"):
        demo.encode_prompt(Tokenizer(), " ")


def test_more_tokens_than_the_context_holds(model):
    with pytest.raises(UserError, match=r"--tokens 120 .* context of 128 tokens; at most 112"):
        demo.window_length(model, 120)


def test_short_context_shortens_the_window(model):
    assert demo.window_length(model, 64) == 64


@pytest.mark.parametrize(("stop", "expected"), [(5, {2, 5}), ([5, 7], {2, 5, 7}), (None, {2})])
def test_stop_tokens_come_from_model_and_tokenizer(model, monkeypatch, stop, expected):
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
    assert demo.stop_tokens(model, Tokenizer()) == expected


def test_bars_of_others_are_off_while_ours_is_on(capsys):
    from tqdm.auto import tqdm

    with quiet_transformers():
        assert list(tqdm([1, 2], desc="Converting")) == [1, 2]
    assert "Converting" not in capsys.readouterr().err
    assert list(tqdm([1, 2], desc="Converting")) == [1, 2]
    assert "Converting" in capsys.readouterr().err


def test_the_float_models_answer_is_beside_the_other():
    said = {"as loaded": "The capital of France is Paris. " * 3, "llmint8": "It is [Paris]."}
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.answers(said))
    first, *_ = console.file.getvalue().splitlines()
    assert first.split("  ")[0] == "as loaded" and first.rstrip().endswith("llmint8")
    text = " ".join(console.file.getvalue().split())
    assert "It is [Paris]." in text and "The capital of France is" in text
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
