"""Serve experts: expert linears by the operator that their device's kernel has for them.

Before::

    y = int8fx.expert_linear(x, 6.0, "column", w_packed, w_scale, experts, ends)

After, on a GPU::

    y = int8fx.expert_linear_gpu(x, 6.0, "column", w_packed, w_scale, experts, ends)
"""

from torch import fx

from int8fx.kernels.ops.expert_linear import expert_linear
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument
from int8fx.passes.graph.values import device_type


def serve_experts(graph: fx.Graph, context: Context) -> Result:
    """Calls what a device has for expert linears; changed: at how many."""
    result = Result()
    for node in graph.find_nodes(op="call_function", target=expert_linear):
        device = device_type(argument(node, "x"))
        target = context.experts(device)
        if target is None:
            result.refuse(f"{device} has no operator of its own for experts")
        else:
            node.target = target
            result.changed += 1
    return result
