"""Join rotated: rotated linears that read the same activation are one call, which rotates it once.

Before::

    y1 = int8fx.rotated_linear(x, 0.0, 64, "hadamard", w1, w_scale1, w_columns1, columns1, bias1)
    y2 = int8fx.rotated_linear(x, 0.0, 64, "hadamard", w2, w_scale2, w_columns2, columns2, bias2)

After::

    y = int8fx.rotated_linears(x, 0.0, 64, "hadamard", [w1, w2], ..., [bias1, bias2])
    y1, y2 = y[0], y[1]

On a GPU this is ``int8fx.rotated_linears_gpu``, of a single linear as well: its kernels are launched
for a list.

Whether two linears keep the same columns is known when they run, as weights are inputs of the graph:
the kernel compares them, and rotates once for each set. Linears that keep as many columns are joined,
and those with a bias with such, only where the bias is there before the first of them.
"""

from collections import defaultdict
from typing import Any

from torch import fx

from int8fx.kernels.ops.rotated_linear import rotated_linear, rotated_linears
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import device_type, shape_of, tensor_of

ALIKE = ("x", "threshold", "block", "rotation")  # what the linears of a call have in common
# Of each linear, and what the call has a list of.
OF_EACH = {"weight": "weights", "w_scale": "w_scales", "w_columns": "w_columns", "columns": "columns"}

ALONE = "no other rotated linear reads its input with what it needs there before"


def join_rotated(graph: fx.Graph, context: Context) -> Result:
    """Joins the rotated linears of one graph; changed: how many calls they became."""
    result = Result()
    for device in context.devices:
        found = context.joined_rotated(device)
        if found is None:
            continue
        target, most = found
        for group in _groups(graph, device, most, context.memory()):
            if len(group) == 1 and target is rotated_linears:
                result.refuse(ALONE)
                continue
            _join(graph, context.fake_mode, group, target)
            result.changed += 1
    return result


def _groups(graph: fx.Graph, device: str, most: int, memory: Memory) -> list[list[fx.Node]]:
    """Linears that one call of at most so many may take the place of, at the first of them."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    open_groups: dict[tuple, list[fx.Node]] = {}
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for linear in graph.find_nodes(op="call_function", target=rotated_linear):
        if device_type(argument(linear, "x")) != device:
            continue
        key = _key(linear)
        group = open_groups.get(key)
        if group is None or len(group) == most or not _fits(linear, group, order, memory):
            group = open_groups[key] = found[linear]
        group.append(linear)
    return list(found.values())


def _key(linear: fx.Node) -> tuple:
    """What the linears of a call have in common: the bias's dtype and how many columns it has, too."""
    alike = (argument(linear, name) for name in ALIKE)
    bias = tensor_of(argument(linear, "bias"))
    return (*alike, bias is not None and bias.dtype, shape_of(argument(linear, "columns")))


def _fits(linear: fx.Node, group: list[fx.Node], order: dict[fx.Node, int], memory: Memory) -> bool:
    first, read = group[0], linear.all_input_nodes
    there = all(order[node] < order[first] for node in read)
    return there and not memory.written_between(first, linear, read)


def _join(graph: fx.Graph, fake_mode: Any, linears: list[fx.Node], target: Any) -> None:
    given = {name: argument(linears[0], name) for name in ALIKE}
    of_each = {
        several: [argument(linear, name) for linear in linears] for name, several in OF_EACH.items()
    }
    biases = [argument(linear, "bias") for linear in linears]
    with graph.inserting_before(linears[0]):
        emit = Emitter(graph, fake_mode, linears[0])
        read = {**of_each, "biases": [] if biases[0] is None else biases}
        call = emit.named(target, **given, **read)
        outputs = [emit.item(call, index) for index in range(len(linears))]
    for linear, y in zip(linears, outputs, strict=True):
        linear.replace_all_uses_with(y)
        graph.erase_node(linear)
