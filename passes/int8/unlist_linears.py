"""Unlist linears: a call of one linear returns its tensor, and no list of one.

Before::

    y = int8fx.int8_linears(x, 6.0, "column", [w], [w_scale], [bias])
    y1 = y[0]

After::

    y1 = int8fx.int8_linears.single(x, 6.0, "column", w, w_scale, bias)

Inductor's wrapper in C++ (``cpp_wrapper``) calls an operator that returns a list through Python, and
takes a list of one for the tensor in it: the process crashes
(``generate_fallback_kernel_with_runtime_lookup_python``, torch 2.13). The new call stays in C++.
"""

from torch import fx

from int8fx.kernels.ops import int8_linear as ops
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import given
from int8fx.passes.graph.emit import Emitter

SEVERAL = "the call is of several linears"


def unlist_linears(graph: fx.Graph, context: Context) -> Result:
    """Rewrites the calls of one linear in one graph; changed: how many."""
    result = Result()
    for call in graph.find_nodes(op="call_function", target=ops.int8_linears):
        values = given(call)
        weights, w_scales, biases = (values.pop(name) for name in ("weights", "w_scales", "biases"))
        if len(weights) != 1:
            result.refuse(SEVERAL)
            continue
        bias = biases[0] if biases else None
        with graph.inserting_before(call):
            emit = Emitter(graph, context.fake_mode, call)
            one = {"weight": weights[0], "w_scale": w_scales[0], "bias": bias}
            y = emit.named(ops.single_int8_linear, **values, **one)
        for item in list(call.users):
            item.replace_all_uses_with(y)
            graph.erase_node(item)
        graph.erase_node(call)
        result.changed += 1
    return result
