"""Group heads: in decode, the query heads that read one key are rows of one attention.

Before, for q ``[B, H, 1, D]``, k and v ``[B, H / G, S, D]``::

    key   = k[:, :, None].expand(B, H / G, G, S, D).reshape(B, H, S, D);   value likewise
    y     = scaled_dot_product_attention(q, key, value, mask)

After::

    y     = scaled_dot_product_attention(q.reshape(B, H / G, G, D), k, v, mask).reshape(B, H, 1, D)

With one query position, heads and positions are the same to an attention, and a mask that is the same
for all heads fits either. Otherwise keys and values are written out G times at every step, and a CPU
works off H products of one row each: 437 us instead of 74 for 9 heads over 3 (S = 576, D = 64, bf16,
two cores of Zen 4), 1215 instead of 84 for 32 over 4, half the time of a compiled decode step.

``attend.py`` comes first and is faster still; this is for what its operator does not serve: autocast,
gradients, float64.
"""

from typing import Any

import torch.nn.functional as F
from torch import fx

from int8fx.kernels.devices import float_speed
from int8fx.passes.contract import Context, Result
from int8fx.passes.float.sdpa import Attention, attentions
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.values import shape_of

POSITIONS = "it has several query positions"
CAUSAL = "it is causal"
MASK = "its mask is not the same for all heads"
NOTHING_SHARED = "each query head has a key head of its own"


def group_heads(graph: fx.Graph, context: Context) -> Result:
    """Groups the heads of every decode attention of one graph; changed: how many that were."""
    result = Result()
    for attention in attentions(graph, context.memory(), result):
        if reason := _reason(attention):
            result.refuse(reason)
        else:
            _group(attention, context.fake_mode)
            result.changed += 1
    return result


def _reason(attention: Attention) -> str:
    """Why it is no decode attention whose heads share keys, or empty."""
    if not float_speed(attention.device).attends_head_by_head:
        return f"torch's own groups them on {attention.device}"
    q, k = shape_of(attention.q), shape_of(attention.k)
    if isinstance(q[2], int) and q[2] != 1:
        return POSITIONS
    if attention.is_causal:
        return CAUSAL
    if attention.mask is not None and shape_of(attention.mask)[1:3] != (1, 1):
        return MASK
    # Sizes that vary are compared last: a comparison may guard the compiled graph.
    if k[1] >= q[1]:
        return NOTHING_SHARED
    return POSITIONS if q[2] != 1 else ""


def _group(attention: Attention, fake_mode: Any) -> None:
    node, graph = attention.node, attention.node.graph
    B, H, _, D = shape_of(attention.q)
    heads = shape_of(attention.k)[1]
    with graph.inserting_before(node):
        emit = Emitter(graph, fake_mode, node)
        rows = emit.method("reshape", attention.q, B, heads, H // heads, D)
        y = emit.call(
            F.scaled_dot_product_attention,
            rows,
            attention.k,
            attention.v,
            attention.mask,
            scale=attention.scale,
        )
        y = emit.method("reshape", y, B, H, 1, shape_of(attention.v)[3])
    node.replace_all_uses_with(y)
    graph.erase_node(node)
