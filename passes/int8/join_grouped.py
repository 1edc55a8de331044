"""Join grouped: linears of 4-bit weights by groups that read the same activation are one call.

Before::

    y1 = int8fx.grouped_linear(x, 32, "integer", 64, "hadamard", w1, scale1, zero_point1, ...)
    y2 = int8fx.grouped_linear(x, 32, "integer", 64, "hadamard", w2, scale2, zero_point2, ...)

After::

    y = int8fx.grouped_linears(x, 32, "integer", 64, "hadamard", [w1, w2], ...)
    y1, y2 = y[0], y[1]

The call rotates and quantises x once for each set of columns that stays in 16-bit. With x as it is
(``grouped_float_linear``) it is read and packed once.
"""

from torch import fx

from int8fx.kernels.ops import grouped_linear as ops
from int8fx.passes.contract import Context, Result
from int8fx.passes.int8.joint import Joint

ALONE = "no other linear of 4-bit weights reads its input with what it needs there before"

_WEIGHT = {"weight": "weights", "scale": "scales", "zero_point": "zero_points", "bias": "biases"}
JOINTS = (
    Joint(
        ops.grouped_linear,
        ops.grouped_linears,
        ("x", "group", "zeros", "block", "rotation"),
        {**_WEIGHT, "w_columns": "w_columns", "columns": "columns"},
        ALONE,
    ),
    Joint(
        ops.grouped_float_linear,
        ops.grouped_float_linears,
        ("x", "group", "zeros"),
        _WEIGHT,
        ALONE,
    ),
)


def join_grouped(graph: fx.Graph, context: Context) -> Result:
    """Joins the linears of one graph; changed: how many calls several of them became."""
    result = Result()
    for device in context.devices:
        for joint in JOINTS:
            result.add(joint.join(graph, context, device))
    return result
