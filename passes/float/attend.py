"""Attend: attentions of few query rows, and of many, become an operator of int8fx.

Before::

    key   = k[:, :, None].expand(B, H / G, G, L, D).reshape(B, H, L, D);   value likewise
    y     = scaled_dot_product_attention(q, key, value, mask)

After::

    y     = int8fx.attention(q, k, v, mask, False, scale)

``kernels/ops/attention.py`` says what it computes, and what that saves. Only where no gradient is asked
for: the operator has none.
"""

import math
from typing import Any

import torch
from torch import fx

from int8fx.kernels.ops.attention import (
    FEW_ROWS,
    MANY_ROWS,
    WIDEST_HEAD,
    attention,
)
from int8fx.kernels.ops.limits import DTYPES
from int8fx.passes.contract import Context, Result
from int8fx.passes.float.sdpa import Attention, attentions
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.values import shape_of, tensor_of

MORE_ROWS = f"more than {FEW_ROWS} query rows read a key head"
FEWER_ROWS = f"fewer than {MANY_ROWS} query rows"
DTYPE = "it is not all in one of fp32, bf16 and fp16, as under autocast"
MASK = "its mask is neither bool, fp32 nor of the query's dtype"
WIDE = f"its heads are wider than {WIDEST_HEAD}"
LAYOUT = "its result lies in memory in another way"


def attend_few_rows(graph: fx.Graph, context: Context) -> Result:
    """Replaces the attentions of few rows in one graph; changed: how many."""
    return _attend(graph, context, few=True)


def attend_many_rows(graph: fx.Graph, context: Context) -> Result:
    """Replaces the attentions of many rows in one graph; changed: how many."""
    return _attend(graph, context, few=False)


def _attend(graph: fx.Graph, context: Context, few: bool) -> Result:
    result = Result()
    for call in attentions(graph, context.memory(), result):
        if not context.attends(call.device, few):
            reason = f"torch's own is as fast on {call.device}"
        else:
            reason = _other_rows(call, few) or _unserved(call) or _replace(call, context.fake_mode)
        if reason:
            result.refuse(reason)
        else:
            result.changed += 1
    return result


def _other_rows(call: Attention, few: bool) -> str:
    _, H, M, _ = shape_of(call.q)
    if few:
        has_few = isinstance(M, int) and H // shape_of(call.k)[1] * M <= FEW_ROWS
        return "" if has_few else MORE_ROWS
    # A number that varies is taken for many: to compare it would compile few rows once more.
    return FEWER_ROWS if isinstance(M, int) and M < MANY_ROWS else ""


def _unserved(call: Attention) -> str:
    """Why the operator does not compute the same, or empty."""
    q, k, v, y = (each.meta["example_value"] for each in (call.q, call.k, call.v, call.node))
    # Under autocast the call casts by itself, and its output is of another dtype than q.
    if q.dtype not in DTYPES or {q.dtype} != {k.dtype, v.dtype, y.dtype}:
        return DTYPE
    mask = tensor_of(call.mask)
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return MASK
    return WIDE if max(q.shape[3], v.shape[3]) > WIDEST_HEAD else ""


def _replace(call: Attention, fake_mode: Any) -> str:
    """Puts the operator in its place; or why it cannot be."""
    node, graph = call.node, call.node.graph
    scale = 1 / math.sqrt(shape_of(call.q)[3]) if call.scale is None else call.scale
    with graph.inserting_before(node):
        emit = Emitter(graph, fake_mode, node)
        y = emit.call(attention, call.q, call.k, call.v, call.mask, call.is_causal, scale)
    if _strides(y) != _strides(node):
        graph.erase_node(y)  # a reader may view it as it lies in memory
        return LAYOUT
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return ""


def _strides(node: fx.Node) -> list[str]:
    """Of the dimensions that have one, as text: comparing symbols would add guards."""
    y = node.meta["example_value"]
    return [str(stride) for size, stride in zip(y.shape, y.stride(), strict=True) if str(size) != "1"]
