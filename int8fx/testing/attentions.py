"""Attention as models spell it, behind an int8 linear: what the tests of its passes compile."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8fx.testing.support import compile_once

HEADS, GROUP, D = 2, 3, 8
K = HEADS * GROUP * D


class Attention(nn.Module):
    """``attend`` on ``q = x @ Wᵀ``: ``x [B, L, K]``, ``k`` and ``v [B, heads, S, D]``."""

    def __init__(self, attend):
        super().__init__()
        self.q = nn.Linear(K, K, bias=False)
        self.attend = attend

    def forward(self, x, k, v, mask):
        B, L, _ = x.shape
        q = self.q(x).view(B, L, HEADS * GROUP, D).transpose(1, 2)
        return self.attend(q, k, v, mask)


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


def inputs(
    L: int, S: int, heads: int = HEADS, mask_heads: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of two sequences: ``x``, ``k``, ``v`` and a mask that shows every row something."""
    torch.manual_seed(0)
    x = torch.randn(2, L, K, dtype=dtype)
    k, v = (torch.randn(2, heads, S, D, dtype=dtype) for _ in range(2))
    mask = torch.rand(2, mask_heads, L, S) > 0.3
    mask[..., 0] = True
    return x, k, v, mask


def compare(attend, x, k, v, mask) -> tuple[Tensor, Tensor, str]:
    """The compiled attention, eager's of the very q that the int8 linear gives, and the graph."""
    torch.manual_seed(0)
    model = Attention(lambda q, k, v, mask: q).requires_grad_(False).to(x.dtype)
    q, _ = compile_once(model, x, k, v, mask)
    model.attend = attend
    y, report = compile_once(model, x, k, v, mask)
    return y, attend(q, k, v, mask), report.graph
