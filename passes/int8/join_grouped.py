"""Join grouped: linears of weights by groups that read the same activation are one call.

Before::

    y1 = int8fx.grouped_linear(x, 32, "integer", 64, "hadamard", w1, scale1, zero_point1, ...)
    y2 = int8fx.grouped_linear(x, 32, "integer", 64, "hadamard", w2, scale2, zero_point2, ...)

After::

    y = int8fx.grouped_linears(x, 32, "integer", 64, "hadamard", [w1, w2], ...)
    y1, y2 = y[0], y[1]

The call rotates and quantises x once for each set of columns that stays in 16-bit. With x as it is
(``grouped_float_linear``) it is read and packed once.

On a GPU these are ``int8fx.grouped_linears_gpu`` and ``int8fx.grouped_float_linears_gpu``, of a single
linear as well: their kernel is launched for a list of linears, whose tensors have the same dtypes.
There ``int8fx.group_linear``, of int8 weights, becomes ``int8fx.group_linears_gpu``. On a device
without such an operator it stays what it is, and Inductor fuses it.
"""

import dataclasses
import functools

from torch import fx

from int8fx.kernels.formats import groups
from int8fx.kernels.ops import grouped_linear as ops
from int8fx.kernels.schemes import weight_only
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument
from int8fx.passes.graph.values import shape_of, tensor_of
from int8fx.passes.int8.joint import Joint

ALONE = "no other linear of 4-bit weights reads its input with what it needs there before"

_WEIGHT = {"weight": "weights", "scale": "scales", "zero_point": "zero_points", "bias": "biases"}
# By the operator and the family that the kernel table has them under.
JOINTS = {
    (ops.INT8_ROWS, ops.FAMILY): Joint(
        ops.grouped_linear,
        ops.grouped_linears,
        ("x", "group", "zeros", "block", "rotation"),
        {**_WEIGHT, "w_columns": "w_columns", "columns": "columns"},
        ALONE,
    ),
    (ops.FLOAT_ROWS, ops.FAMILY): Joint(
        ops.grouped_float_linear,
        ops.grouped_float_linears,
        ("x", "group", "zeros"),
        _WEIGHT,
        ALONE,
    ),
}
# Of these there is no operator of several linears but a device's own.
OF_A_DEVICE = {
    (weight_only.GROUP_LINEAR, groups.FAMILY): Joint(
        weight_only.group_linear,
        None,
        ("x",),
        {"weight": "weights", "w_scale": "w_scales", "bias": "biases"},
        ALONE,
    ),
}


def join_grouped(graph: fx.Graph, context: Context) -> Result:
    """Joins the linears of one graph; changed: how many calls they became."""
    result = Result()
    for device in context.devices:
        for (operator, family), joint in (JOINTS | OF_A_DEVICE).items():
            own = context.joined_by(operator, device, family)
            if own is not None:
                alike = dataclasses.replace(joint, key=functools.partial(_tensors_of, joint))
                result.add(alike.join(graph, context, device, *own))
            elif (operator, family) in JOINTS:
                result.add(joint.join(graph, context, device))
    return result


def _tensors_of(joint: Joint, linear: fx.Node) -> tuple:
    """What a kernel wants to be the same: the dtypes of a linear's tensors, its groups and columns."""
    tensors = [tensor_of(argument(linear, name)) for name in joint.of_each]
    dtypes = (tensor is not None and tensor.dtype for tensor in tensors)
    counted = [name for name in ("weight", "w_scale", "columns") if name in joint.of_each]
    return *dtypes, *((shape_of(argument(linear, name)) or ())[-1:] for name in counted)
