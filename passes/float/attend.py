"""Attend: attentions of many query rows, and of few, become an operator of our own.

Before::

    key   = k[:, :, None].expand(B, H / G, G, L, D).reshape(B, H, L, D);   value likewise
    y     = scaled_dot_product_attention(q, key, value, mask)

After::

    y     = int8fx.attention(q, k, v, mask, False, scale)

``kernels/ops/attention.py`` says what it computes, and what that saves. Only where no gradient is asked
for: the operator has none.
"""

import functools
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
from int8fx.passes.float.sdpa import Attention, attentions
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import shape_of, tensor_of


def attend(graph: fx.Graph, fake_mode: Any, memory: Memory, few: bool) -> int:
    """Replaces the attentions of one graph, of few rows or of many; returns how many that were."""
    wanted = _few_rows if few else _many_rows
    found = [each for each in attentions(graph, memory) if wanted(each) and _serves(each)]
    return sum(_replace(each, fake_mode) for each in found)


attend_few = functools.partial(attend, few=True)
attend_many = functools.partial(attend, few=False)


def _few_rows(call: Attention) -> bool:
    _, H, M, _ = shape_of(call.q)
    return isinstance(M, int) and H // shape_of(call.k)[1] * M <= FEW_ROWS


def _many_rows(call: Attention) -> bool:
    return call.q.meta["example_value"].shape[2] >= MANY_ROWS


def _serves(call: Attention) -> bool:
    """Whether the operator computes the same."""
    q, k, v, y = (each.meta["example_value"] for each in (call.q, call.k, call.v, call.node))
    # Under autocast the call casts by itself, and its output is of another dtype than q.
    alike = q.dtype in DTYPES and {q.dtype} == {k.dtype, v.dtype, y.dtype}
    mask = tensor_of(call.mask)
    mask_fits = mask is None or mask.dtype in (torch.bool, torch.float32, q.dtype)
    fits = alike and mask_fits and q.shape[3] <= WIDEST_HEAD and v.shape[3] <= WIDEST_HEAD
    return call.on_cpu and fits


def _replace(call: Attention, fake_mode: Any) -> bool:
    node, graph = call.node, call.node.graph
    scale = 1 / math.sqrt(shape_of(call.q)[3]) if call.scale is None else call.scale
    with graph.inserting_before(node):
        emit = Emitter(graph, fake_mode, node)
        y = emit.call(attention, call.q, call.k, call.v, call.mask, call.is_causal, scale)
    if _strides(y) != _strides(node):
        graph.erase_node(y)  # a reader may view it as it lies in memory
        return False
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return True


def _strides(node: fx.Node) -> list[str]:
    """Of the dimensions that have one, as text: comparing symbols would add guards."""
    y = node.meta["example_value"]
    return [str(stride) for size, stride in zip(y.shape, y.stride(), strict=True) if str(size) != "1"]
