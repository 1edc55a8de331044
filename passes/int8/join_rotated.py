"""Join rotated: rotated linears that read the same activation are one call, which rotates it once.

Before::

    y1 = int8fx.rotated_linear(x, 0.0, 64, "hadamard", w1, w_scale1, w_columns1, columns1, bias1)
    y2 = int8fx.rotated_linear(x, 0.0, 64, "hadamard", w2, w_scale2, w_columns2, columns2, bias2)

After::

    y = int8fx.rotated_linears(x, 0.0, 64, "hadamard", [w1, w2], ..., [bias1, bias2])
    y1, y2 = y[0], y[1]

Whether two linears keep the same columns is known when they run, as weights are inputs of the graph:
the kernel compares them, and rotates once for each set. Linears with a bias are joined with such, and
only where the bias is there before the first of them.
"""

from collections import defaultdict
from typing import Any

from torch import fx

from int8fx.kernels.ops.rotated_linear import rotated_linear, rotated_linears
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory

MOST = 64  # linears of one call
_SHARED, _BIAS = 4, 8  # rotated_linear's arguments: what a group has in common, and the last


def join_rotated(graph: fx.Graph, fake_mode: Any, memory: Memory) -> int:
    """Joins the rotated linears of one graph; returns how many calls several of them became."""
    groups = _groups(graph, memory)
    for group in groups:
        _join(graph, fake_mode, group)
    return len(groups)


def _groups(graph: fx.Graph, memory: Memory) -> list[list[fx.Node]]:
    """Linears that one call may take the place of, at the first of them."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    open_groups: dict[tuple, list[fx.Node]] = {}
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for linear in graph.find_nodes(op="call_function", target=rotated_linear):
        key = (*linear.args[:_SHARED], linear.args[_BIAS] is None)
        group = open_groups.get(key)
        if group is None or not _fits(linear, group, order, memory):
            group = open_groups[key] = found[linear]
        group.append(linear)
    return [group for group in found.values() if len(group) > 1]


def _fits(linear: fx.Node, group: list[fx.Node], order: dict[fx.Node, int], memory: Memory) -> bool:
    first, read = group[0], linear.all_input_nodes
    there = all(order[node] < order[first] for node in read)
    return len(group) < MOST and there and not memory.written_between(first, linear, read)


def _join(graph: fx.Graph, fake_mode: Any, linears: list[fx.Node]) -> None:
    *parts, last = zip(*(linear.args[_SHARED:] for linear in linears), strict=True)
    biases = [] if last[0] is None else list(last)
    with graph.inserting_before(linears[0]):
        emit = Emitter(graph, fake_mode, linears[0])
        call = emit.call(rotated_linears, *linears[0].args[:_SHARED], *map(list, parts), biases)
        outputs = [emit.item(call, index) for index in range(len(linears))]
    for linear, y in zip(linears, outputs, strict=True):
        linear.replace_all_uses_with(y)
        graph.erase_node(linear)
