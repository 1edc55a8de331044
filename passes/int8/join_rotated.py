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

from torch import fx

from int8fx.kernels.ops.rotated_linear import rotated_linear, rotated_linears
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument
from int8fx.passes.graph.values import shape_of, tensor_of
from int8fx.passes.int8.joint import Joint

ALONE = "no other rotated linear reads its input with what it needs there before"


def _key(linear: fx.Node) -> tuple:
    bias = tensor_of(argument(linear, "bias"))
    return bias is not None and bias.dtype, shape_of(argument(linear, "columns"))


ROTATED = Joint(
    rotated_linear,
    rotated_linears,
    ("x", "threshold", "block", "rotation"),
    {
        "weight": "weights",
        "w_scale": "w_scales",
        "w_columns": "w_columns",
        "columns": "columns",
        "bias": "biases",
    },
    ALONE,
    _key,
)


def join_rotated(graph: fx.Graph, context: Context) -> Result:
    """Joins the rotated linears of one graph; changed: how many calls they became."""
    result = Result()
    for device in context.devices:
        found = context.joined_rotated(device)
        if found is not None:
            result.add(ROTATED.join(graph, context, device, *found))
    return result
