"""Grouping the heads of decode attentions: where it may be, where not, and that it changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from support import compile_once
from torch import nn

HEADS, GROUP, S, D = 2, 3, 10, 8
K = HEADS * GROUP * D


def repeat(k):
    """As transformers' ``repeat_kv`` spells it."""
    B, heads, S, D = k.shape
    return k[:, :, None, :, :].expand(B, heads, GROUP, S, D).reshape(B, heads * GROUP, S, D)


def repeated(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, scale=0.3)


def native(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)


def cache_written_after_the_repeat(q, k, v, mask):
    k = k.clone()
    key, value = repeat(k), repeat(v)
    k.zero_()
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask) + k.sum()


class Attention(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.q = nn.Linear(K, K, bias=False)
        self.attend = attend

    def forward(self, x, k, v, mask):
        B, L, _ = x.shape
        q = self.q(x).view(B, L, HEADS * GROUP, D).transpose(1, 2)
        return self.attend(q, k, v, mask)


def inputs(L=1, mask_heads=1, heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, L, K, generator=generator)
    k, v = (torch.randn(2, heads, S, D, generator=generator) for _ in range(2))
    mask = torch.rand(2, mask_heads, L, S, generator=generator) > 0.3
    mask[..., 0] = True
    return x, k, v, mask


def run(attend, **sizes):
    """The compiled attention, eager's of the very q that the int8 linear gives, and the graph."""
    torch.manual_seed(0)
    model = Attention(lambda q, k, v, mask: q).requires_grad_(False)
    x, k, v, mask = inputs(**sizes)
    q, _ = compile_once(model, x, k, v, mask)
    model.attend = attend
    y, report = compile_once(model, x, k, v, mask)
    return y, attend(q, k, v, mask), report.graph


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
