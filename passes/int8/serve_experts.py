"""Expert linears by the operator that their device's kernel has for them."""

from collections.abc import Callable
from typing import Any

from torch import fx

from int8fx.kernels.ops.expert_linear import expert_linear


def serve_experts(graph: fx.Graph, served: Callable[[str], Any]) -> int:
    """Calls what a device has for expert linears; returns at how many.

    Args:
        served: for a device type, the operator that takes the place of ``int8fx.expert_linear``, with
            its arguments; or None.
    """
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=expert_linear):
        target = served(node.args[0].meta["example_value"].device.type)
        if target is not None:
            node.target = target
            replaced += 1
    return replaced
