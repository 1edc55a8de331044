"""Share quantizations: linears that read the same activation share its quantisation.

Before::

    q  = int8fx.quantize(x, 6.0, "column");   y1 = int8fx.int8_linear(q[0], ..., w1)
    q' = int8fx.quantize(x, 6.0, "column");   y2 = int8fx.int8_linear(q'[0], ..., w2)

After::

    q  = int8fx.quantize(x, 6.0, "column")
    y1 = int8fx.int8_linear(q[0], ..., w1);   y2 = int8fx.int8_linear(q[0], ..., w2)

Fusing the quantisation into the norm before it is Inductor's part.
"""

import operator

from torch import fx

from int8fx.passes.contract import Context, Result

WRITTEN = "the graph writes to the input between the two quantisations"
OTHER_SETTINGS = "another linear quantises the input with other settings"


def share_quantizations(graph: fx.Graph, context: Context) -> Result:
    """Shares quantisations in one graph; changed: how many were saved."""
    memory, result = context.memory(), Result()
    seen: dict[tuple, fx.Node] = {}
    inputs: set[tuple[fx.Node, ...]] = set()
    for node in list(graph.nodes):
        if node.target not in context.quantizers:
            continue
        read = tuple(node.all_input_nodes)
        call = node.target, node.args, tuple(node.kwargs.items())
        first = seen.setdefault(call, node)
        if first is node:
            if read in inputs:
                result.refuse(OTHER_SETTINGS)
        elif memory.written_between(first, node, read):
            result.refuse(WRITTEN)
            seen[call] = node
        else:
            _take_over(graph, node, first)
            result.changed += 1
        inputs.add(read)
    context.quantizations += sum(node.target in context.quantizers for node in graph.nodes)
    return result


def _take_over(graph: fx.Graph, node: fx.Node, first: fx.Node) -> None:
    items = {item.args[1]: item for item in first.users if item.target is operator.getitem}
    for item in list(node.users):
        item.replace_all_uses_with(items[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(node)
