"""Fuse prologue: linears that read the same activation share its quantisation.

Before::

    q  = int8fx.quantize(x, 6.0, "column");   y1 = int8fx.int8_linear(q[0], ..., w1)
    q' = int8fx.quantize(x, 6.0, "column");   y2 = int8fx.int8_linear(q'[0], ..., w2)

After::

    q  = int8fx.quantize(x, 6.0, "column")
    y1 = int8fx.int8_linear(q[0], ..., w1);   y2 = int8fx.int8_linear(q[0], ..., w2)

Fusing the quantisation into the norm before it is Inductor's part.
"""

import operator
from collections.abc import Collection
from typing import Any

from torch import fx

from int8fx.passes.graph.mutation import Memory


def fuse_prologue(graph: fx.Graph, quantizers: Collection[Any], memory: Memory) -> int:
    """Shares quantisations in one graph; returns how many were saved.

    Args:
        quantizers: the operators whose equal calls are one.
    """
    seen: dict[tuple, fx.Node] = {}
    saved = 0
    for node in list(graph.nodes):
        if node.target not in quantizers:
            continue
        first = seen.setdefault((node.target, node.args), node)
        if first is node:
            continue
        if memory.written_between(first, node, node.all_input_nodes):
            seen[node.target, node.args] = node
        else:
            _take_over(graph, node, first)
            saved += 1
    return saved


def _take_over(graph: fx.Graph, node: fx.Node, first: fx.Node) -> None:
    items = {item.args[1]: item for item in first.users if item.target is operator.getitem}
    for item in list(node.users):
        item.replace_all_uses_with(items[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(node)
