"""One row: a linear that stays in float, the output head, is in decode a sum along its weight.

    y = linear(x, w, b)        x [..., K] of one row, w [N, K]
    y = (once(x.float()) * w.float()).sum(-1) + b

Inductor fuses the right side into one read of the weight, at the speed of memory. A library's product
of one row reads it at half of that: 3.4 ms instead of 1.8 for SmolLM2's head of 49152 x 576 in bf16,
7.1 instead of 3.6 for 32000 x 2048 (two cores of Zen 4). Sums are fp32, rounded once.

``once`` writes the row to memory. Without, Inductor puts the norm in front of the head into the sum,
and computes it again for each of the N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.kernels.devices import float_speed
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.ops.once import once
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.values import shape_of, tensor_of

LEAST_BYTES = 4 << 20  # smaller weights stay in a cache

UNKNOWN = "its input, weight or result is no tensor"
DTYPE = "it is not all in one of fp32, bf16 and fp16, as under autocast"
SIZES = "its sizes vary"
ROWS = "it has several rows, or none"
SMALL = "its weight is small enough for a cache"


def one_row(graph: fx.Graph, context: Context) -> Result:
    """Rewrites every such linear of one graph; changed: how many that were.

    It does not apply where a gradient is asked for: weights would be written out for it.
    """
    result = Result()
    for node in graph.find_nodes(op="call_function", target=F.linear):
        if reason := _reason(node):
            result.refuse(reason)
        else:
            _rewrite(node, context.fake_mode)
            result.changed += 1
    return result


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def _reason(node: fx.Node) -> str:
    """Why a linear stays a product, or empty."""
    x, w, y = (tensor_of(each) for each in (*_operands(node)[:2], node))
    if x is None or w is None or y is None:
        return UNKNOWN
    if not float_speed(x.device.type).one_row_is_slow:
        return f"a product of one row is as fast on {x.device.type}"
    # Under autocast the call casts by itself, and its output is of another dtype.
    if x.dtype not in DTYPES or not x.dtype == w.dtype == y.dtype:
        return DTYPE
    if not all(isinstance(size, int) for size in (*x.shape, *w.shape)):
        return SIZES
    if x.shape[:-1].numel() != 1:
        return ROWS
    return "" if w.dim() == 2 and w.nbytes >= LEAST_BYTES else SMALL


def _rewrite(node: fx.Node, fake_mode: Any) -> None:
    x, w, bias = _operands(node)
    dtype = node.meta["example_value"].dtype
    with node.graph.inserting_before(node):
        emit = Emitter(node.graph, fake_mode, node)
        row = emit.call(once, emit.method("float", emit.method("reshape", x, -1)))
        y = emit.method("sum", emit.call(torch.mul, row, emit.method("float", w)), -1)
        if bias is not None:
            y = emit.call(torch.add, y, bias)
        y = emit.method("reshape", emit.method("to", y, dtype), *shape_of(node))
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)
