"""Attention of many query rows, or of few: ``F.scaled_dot_product_attention``, for inference.

    y[b, h, m] = Σ_l softmax_l(q[b, h, m] · k[b, h // G, l] · scale + mask[b, h, m, l]) v[b, h // G, l]

    q     [B, H, M, D], fp32, bf16 or fp16
    k, v  [B, H / G, L, D] and [B, H / G, L, DV], of q's dtype: G query heads share a key head
    mask  None, or what broadcasts to [B, H, M, L]: bool, where False hides a key, or a float to add
    y     [B, H, M, DV] of q's dtype, its rows as [B, M, H, DV] in memory

A row that sees no key is zeros. Scores, softmax and sums are fp32 (``kernels/cpu/attention.h``).

Attention stays in float, as in the paper. But beside linears in int8 torch's is half of a prefill: on
a CPU without AMX it multiplies bf16 by MKL, which on AMD means fp32 by AVX2, and it computes the keys
that the mask hides. Two cores of Zen 4 take 5.5 ms for 9 heads over 3 of 512 rows and 576 keys (D = 64,
bf16, causal mask), and 2.5 here; 20 and 9.5 for 32 over 4.

In a decode step torch's works off H products of one row each, over keys that are written out for each
of them. Even when it is given the query heads of a key head as its rows, two cores of Zen 5 take 49 us
for 9 over 3 of 576 keys, and 16 here; 66 and 28 for 32 over 4; 720 and 100 for 25 heads of their own.
"""

import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.ops.library import register

WIDEST_HEAD = 256  # D and DV of the kernel, at most
# Query positions from which blocks are faster than torch's attention: with fewer, reading the keys is
# most of the time.
MANY_ROWS = 32
FEW_ROWS = 16  # query rows that share a key head, up to which reading it is all


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """The same by torch."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    y = attention_reference(q, k, v, mask, is_causal, scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    B, H, M, _ = q.shape
    return q.new_empty(B, M, H, v.shape[3]).transpose(1, 2)


attention = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale) -> Tensor",
    _attention,
    _fake,
)
