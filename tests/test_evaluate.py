"""Evaluation against numbers worked out by hand, and on a random Llama."""

import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from int8fx.analysis.evaluate import FLOAT, Settings, evaluate
from int8fx.analysis.metrics import (
    ROWS_AT_ONCE,
    compare,
    sample_text,
    token_kl,
    token_nll,
    windows,
)


def log_of(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is the given rows; a constant is added, which no softmax sees."""
    return torch.tensor(rows).log() + 3.0


def test_nll_is_minus_log_of_the_next_tokens_probability():
    logits = log_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3])
    nll = token_nll(logits, torch.tensor([2, 1, 2]))
    # Row 0 predicts token 1, row 1 predicts token 2, and nothing follows row 2.
    assert nll.tolist() == pytest.approx([-math.log(0.25), -math.log(0.8)])


def test_kl_of_two_coins():
    kl = token_kl(log_of([0.5, 0.5], [0.9, 0.1]), log_of([0.25, 0.75], [0.9, 0.1]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl.tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_kl_is_not_symmetric():
    a, b = log_of([0.9, 0.1]), log_of([0.5, 0.5])
    assert token_kl(a, b).item() != pytest.approx(token_kl(b, a).item(), abs=1e-2)


def test_blocks_of_rows_change_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = 2 * ROWS_AT_ONCE + 3
    p, q = (torch.randn(rows, 11, generator=generator) for _ in range(2))
    whole = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(token_kl(p, q), whole)
    ids = torch.randint(0, 11, (rows,), generator=generator)
    expected = -p.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(token_nll(p, ids), expected)


def test_compare_by_hand():
    # Two windows of two tokens; the model ignores its input and never says token 2.
    fair = log_of([0.4, 0.3, 0.3], [0.4, 0.3, 0.3])
    biased = log_of([0.3, 0.4, 0.3], [0.5, 0.2, 0.3])
    scores = compare(
        lambda ids: fair[None],
        {"biased": lambda ids: biased[None]},
        torch.tensor([[0, 1], [2, 0]]),
    )["biased"]
    kl = (
        0.4 * math.log(0.4 / 0.3) + 0.3 * math.log(0.3 / 0.4),
        0.4 * math.log(0.4 / 0.5) + 0.3 * math.log(0.3 / 0.2),
    )
    assert scores.tokens == 2
    assert scores.perplexity == pytest.approx((1 / 0.4 * 1 / 0.3) ** 0.5, rel=1e-6)
    assert scores.mean_kl == pytest.approx(sum(kl) / 2, abs=1e-6)
    assert scores.max_kl == pytest.approx(max(kl), abs=1e-6)
    assert scores.top1 == 0.5


def test_reference_is_run_once_per_window_and_agrees_with_itself():
    calls = []

    def reference(ids: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(ids.shape))
        return torch.nn.functional.one_hot(ids, 5).float()

    done: list[int] = []
    scores = compare(reference, {"itself": reference}, torch.arange(6).reshape(2, 3) % 5, done.append)
    assert calls == [(1, 3), (1, 3)]
    assert done == [1, 2]
    assert scores["itself"].mean_kl == 0.0
    assert scores["itself"].top1 == 1.0


def test_random_llama_agrees_with_transformers_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    token_windows = torch.randint(0, 50, (3, 8))
    logits = {"itself": lambda ids: model(input_ids=ids).logits}
    scores = compare(logits["itself"], logits, token_windows)["itself"]
    with torch.no_grad():
        loss = model(input_ids=token_windows, labels=token_windows).loss.item()
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores.tokens == 3 * 7


def test_windows_drop_the_remainder():
    assert windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows(torch.arange(7), 3, 1).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("count", [0, 3])
def test_windows_that_are_not_there(count):
    with pytest.raises(ValueError, match=f"{count} windows of 3 tokens.*the text has 2"):
        windows(torch.arange(7), 3, count)


def test_windows_of_one_token_predict_nothing():
    with pytest.raises(ValueError, match="at least 2"):
        windows(torch.arange(7), 1)


def test_sample_text_ships_with_the_package():
    text = sample_text()
    assert text.startswith("CHAPTER I\n\nEmma Woodhouse, handsome, clever, and rich")
    # At about four characters a token, twenty windows of 512 with room to spare.
    assert len(text) > 60_000
    assert text.isascii()


def test_contenders_that_are_no_scheme_stand_beside_those_that_are():
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(20, 32), torch.nn.Linear(32, 20)

    def model(input_ids, use_cache=False):
        return SimpleNamespace(logits=head(embedding(input_ids)))

    def in_bf16(input_ids):
        return model(input_ids).logits.detach().bfloat16()

    settings = Settings({}, windows=2, length=8, others={"bf16": in_bf16})
    found = evaluate(model, torch.randint(0, 20, (32,)), settings, "toy", Console(quiet=True))
    assert list(found.accuracies) == [FLOAT, "bf16"]
    assert found.accuracies[FLOAT].mean_kl == 0 < found.accuracies["bf16"].mean_kl < 1e-3
