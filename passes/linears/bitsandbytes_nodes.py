"""bitsandbytes: its int8 linears, as a graph shows them, become ours.

Before (``Linear8bitLt`` in eval mode, threshold 6; below a threshold of 0 one ``int8_scaled_mm``)::

    q = bitsandbytes.int8_vectorwise_quant(A.to(torch.float16), 6.0)
    y = bitsandbytes.int8_mixed_scaled_mm(A, q[0], CB, q[1], SCB, q[2], bias)[0]

After::

    q = int8fx.quantize(A, 6.0, "column")
    y = int8fx.int8_linear(q[0], q[1], q[2], q[3], CB packed, SCB / 127, bias)

The number of outlier columns is a size in bitsandbytes' graph, and what hangs on it (assertions) goes.
``MatmulLtState.idx``, a record of those columns for training, is left empty. So is the write of
``weight.data = state.CB`` at each call, where both are one memory already.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from int8fx.passes.graph.emit import Emitter

QUANTIZE = "bitsandbytes.int8_vectorwise_quant"
MIXED = "bitsandbytes.int8_mixed_scaled_mm"
SCALED = "bitsandbytes.int8_scaled_mm"
PARAMETER = "Int8Params"
# ``weight.data = value`` in a graph of torch 2.13 and before, and of 2.14.
_OF_2_14 = getattr(torch.ops.aten, "shallow_copy_data_", None)
REBINDING = (torch.Tensor.set_, *([] if _OF_2_14 is None else [_OF_2_14]))


@dataclass(frozen=True, eq=False)
class BitsAndBytesLinear:
    """One linear of bitsandbytes.

    Attributes:
        node: its product; the result is ``node`` or, of the mixed one, its item 0.
        quantization: of ``x``.
        x: ``[M, K]``, as it was before the cast to fp16.
        weight, scale: the placeholders of ``CB [N, K]`` int8 and ``SCB [N]`` fp32 = 127 · w_scale.
        bias: ``[N]`` or None.
        threshold: of the module.
    """

    node: fx.Node
    quantization: fx.Node
    x: fx.Node
    weight: fx.Node
    scale: fx.Node
    bias: fx.Node | None
    threshold: float

    @property
    def read(self) -> list[fx.Node]:
        """What a quantisation of ``x`` reads: what it was flattened from, where it was."""
        return [self.x, *self.x.all_input_nodes]


def find(graph: fx.Graph) -> list[BitsAndBytesLinear]:
    """The linears of a graph whose weights are its inputs, in the order in which they run."""
    return [linear for node in graph.nodes if (linear := _match(node)) is not None]


def _match(node: fx.Node) -> BitsAndBytesLinear | None:
    name = _name(node)
    arguments: list[Any] = list(node.args)
    if name == MIXED and len(arguments) == 7:
        A, CA, CB, _, SCB, _, bias = arguments
    elif name == SCALED and len(arguments) >= 4:
        CA, CB, _, SCB = arguments[:4]
        A, bias = None, node.kwargs.get("bias")
    else:
        return None
    quantization = CA.args[0] if CA.target is operator.getitem else None
    if quantization is None or _name(quantization) != QUANTIZE:
        return None
    if CB.op != "placeholder" or SCB.op != "placeholder":
        return None
    cast, *threshold = quantization.args
    x = A if A is not None else _before_cast(cast)
    return BitsAndBytesLinear(
        node, quantization, x, CB, SCB, bias, float(threshold[0] if threshold else 0.0)
    )


def _before_cast(node: fx.Node) -> fx.Node:
    is_cast = node.op == "call_method" and node.target == "to" and node.args[1:] == (torch.float16,)
    return node.args[0] if is_cast else node  # type: ignore[return-value]


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    return str(node.target).removesuffix(".default")


def replace(
    linear: BitsAndBytesLinear,
    w_packed: fx.Node,
    product: Callable[..., fx.Node],
    fake_mode: Any,
) -> fx.Node:
    """Rewrites one linear in place; returns the node that takes its place.

    Args:
        w_packed: placeholder of the packed weight.
        product: ``(call, x, [w_packed, w_scale], bias)`` to ``y [M, N]``.
    """
    graph = linear.node.graph
    # Before everything, as linears of one input are joined where the first of them stood.
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        top = Emitter(graph, fake_mode, linear.node)
        w_scale = top.call(torch.div, linear.scale, 127.0)
    with graph.inserting_before(linear.quantization):
        emit = Emitter(graph, fake_mode, linear.node)
        y = _product(emit, linear, product, [w_packed, w_scale])
        no_columns = emit.call(torch.arange, 0)
    mixed = _name(linear.node) == MIXED
    for result in _items(linear.node, 0) if mixed else [linear.node]:
        result.replace_all_uses_with(y)
    for item in _items(linear.quantization, 2):
        graph.output_node().replace_input_with(item, no_columns)
    _erase(linear.node)
    _erase(linear.quantization)
    return y


def _product(
    emit: Emitter, linear: BitsAndBytesLinear, product: Callable[..., fx.Node], weight: list[fx.Node]
) -> fx.Node:
    """Of the input as it was before each linear flattened it for itself: it is quantised once."""
    x, N = linear.x, linear.scale.meta["example_value"].shape[0]
    if x.op == "call_method" and x.target == "reshape" and x.args[1] == -1 and len(x.args) == 3:
        y = product(emit.call, x.args[0], weight, linear.bias)
        return emit.method("reshape", y, -1, N)
    return product(emit.call, x, weight, linear.bias)


def drop_rebinding(graph: fx.Graph, is_one_memory: Callable[[fx.Node, fx.Node], bool]) -> None:
    """Takes out ``weight.data = state.CB`` where that changes nothing.

    Args:
        is_one_memory: whether two placeholders are views of the same memory.
    """
    for target in REBINDING:
        for node in graph.find_nodes(op="call_function", target=target):
            weight, value = node.args
            if weight.op == value.op == "placeholder" and is_one_memory(weight, value):
                _erase(node)


def _items(node: fx.Node, index: int) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def _erase(node: fx.Node) -> None:
    """Takes out a node and all that hangs on it."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)
