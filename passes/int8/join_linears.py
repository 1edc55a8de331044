"""Join linears: on a device whose kernel quantises by itself, one call quantises and multiplies.

Before::

    q  = int8fx.quantize(x, 6.0, "column")
    y1 = int8fx.int8_linear(q[0], q[1], q[2], q[3], w1, w_scale1, None)
    y2 = int8fx.int8_linear(q[0], q[1], q[2], q[3], w2, w_scale2, None)

After::

    y = int8fx.int8_linears_gpu(x, 6.0, "column", [w1, w2], [w_scale1, w_scale2], [])
    y1, y2 = y[0], y[1]

So q/k/v are one product, and gate/up are. A bias that is computed in the graph may come after the
quantisation, or be written to until then; it is added after the product instead.

A CPU has such an operator as well (``int8fx.int8_linears``), although Inductor could fuse
the quantisation with a norm. A norm and two linears in bf16 with six outlier columns took that way,
on two cores with AMX, 1.48 times as long at M = 512 (K = 576, N = 1536; 1.31 at K = N = 4096), for
the dense copy of the outliers; 1.04 and 1.13 times at M = 16, and 1.00 and 0.98 at M = 1. And it is
ten times the nodes for Inductor to compile.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from int8fx.kernels.ops import int8_linear as ops
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument, given
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import device_type

KINDS_OF_BIAS = "linears of one input have biases of several dtypes, or some have none"


def join_linears(graph: fx.Graph, context: Context) -> Result:
    """Joins the linears of one graph; changed: how many calls they became."""
    memory, result = context.memory(), Result()
    for quantize in graph.find_nodes(op="call_function", target=ops.quantize):
        device = device_type(argument(quantize, "x"))
        found = context.joined(device)
        if found is None:
            result.refuse(f"{device} has no operator that quantises and multiplies")
            continue
        operator_, limit = found
        linears = _readers(quantize)
        early = {linear for linear in linears if _has_early_bias(linear, quantize, memory)}
        alike = _by_bias(linears, early)
        groups = list(_groups(alike, limit))
        for group in groups:
            _join(graph, context.fake_mode, quantize, group, early.issuperset(group), operator_)
        for item in list(quantize.users):
            graph.erase_node(item)
        graph.erase_node(quantize)
        result.changed += len(groups)
        result.refuse(KINDS_OF_BIAS, len(alike) - 1)
        result.refuse(f"a call takes {limit} linears at most", len(groups) - len(alike))
    return result


def _readers(quantize: fx.Node) -> list[fx.Node]:
    """The linears that read a quantisation, in the order in which they run."""
    readers = {user for item in quantize.users for user in item.users}
    # With threshold 0 the linear reads x itself as well, but its int8 form from here.
    return [node for node in quantize.graph.nodes if node in readers]


def _has_early_bias(linear: fx.Node, quantize: fx.Node, memory: Memory) -> bool:
    """Whether a linear's bias is what it is where its input is quantised already."""
    bias = argument(linear, "bias")
    is_input = isinstance(bias, fx.Node) and bias.op == "placeholder"
    return is_input and not memory.written_between(quantize, linear, [bias])


def _by_bias(linears: Sequence[fx.Node], early: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Linears that a call can take together: all with an early bias of one dtype, or all without."""
    alike: dict[torch.dtype | None, list[fx.Node]] = {}
    for linear in linears:
        bias = argument(linear, "bias")
        key = bias.meta["example_value"].dtype if linear in early else None
        alike.setdefault(key, []).append(linear)
    return list(alike.values())


def _groups(alike: Sequence[list[fx.Node]], limit: int) -> Iterator[list[fx.Node]]:
    for linears in alike:
        for start in range(0, len(linears), limit):
            yield linears[start : start + limit]


def _join(
    graph: fx.Graph,
    fake_mode: Any,
    quantize: fx.Node,
    linears: list[fx.Node],
    early: bool,
    target: Callable[..., Any],
) -> None:
    weights, w_scales, biases = (
        [argument(linear, name) for linear in linears] for name in ("weight", "w_scale", "bias")
    )
    with graph.inserting_before(quantize):
        emit = Emitter(graph, fake_mode, linears[0])
        read = {"weights": weights, "w_scales": w_scales, "biases": biases if early else []}
        call = emit.named(target, **given(quantize), **read)
        outputs = [emit.item(call, index) for index in range(len(linears))]
    for linear, y, bias in zip(linears, outputs, biases, strict=True):
        if isinstance(bias, fx.Node) and not early:
            with graph.inserting_before(linear):
                y = _add(Emitter(graph, fake_mode, linear), y, bias)
        linear.replace_all_uses_with(y)
        graph.erase_node(linear)


def _add(emit: Emitter, y: fx.Node, bias: fx.Node) -> fx.Node:
    """In y's dtype: under autocast y is 16-bit and a bias fp32."""
    dtype = y.meta["example_value"].dtype
    total = emit.call(operator.add, y, bias)
    return total if total.meta["example_value"].dtype == dtype else emit.method("to", total, dtype)
