"""Grouping the heads of decode attentions: where it may be, where not, and that it changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from int8fx.kernels import table
from int8fx.testing.attentions import GROUP, HEADS, causal, compare, inputs, native, repeat, repeated


@pytest.fixture(autouse=True)
def no_operator(monkeypatch):
    """As where ``passes/float/attend.py`` leaves an attention alone."""
    monkeypatch.setattr(table, "attends", lambda device, few: False)


def cache_written_after_the_repeat(q, k, v, mask):
    k = k.clone()
    key, value = repeat(k), repeat(v)
    k.zero_()
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask) + k.sum()


def run(attend, L=1, **sizes):
    return compare(attend, *inputs(L, S=10, **sizes))


@pytest.mark.parametrize("attend", [repeated, native], ids=lambda attend: attend.__name__)
def test_a_decode_attention_is_grouped(attend):
    y, expected, graph = run(attend)
    assert "f32[2, 2, 3, 8]" in graph
    assert "expand" not in graph
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("attend", "given"),
    [
        (repeated, {"L": 2}),
        (repeated, {"mask_heads": HEADS * GROUP}),
        (causal, {}),
        (cache_written_after_the_repeat, {}),
        (native, {"heads": HEADS * GROUP}),
    ],
    ids=["two positions", "a mask for each head", "causal", "written between", "nothing shared"],
)
def test_other_attentions_are_left_alone(attend, given):
    y, expected, graph = run(attend, **given)
    assert "f32[2, 2, 3, 8]" not in graph
    torch.testing.assert_close(y, expected)
