"""Fuse epilogue: a bias that the model adds after its matmul moves into the int8 linear.

Before::

    y = int8fx.int8_linear(q..., w_packed, w_scale, None)
    z = y + bias

After::

    z = int8fx.int8_linear(q..., w_packed, w_scale, bias)

The sum is then taken in fp32, before the result is rounded to 16-bit. Activations and residuals after
the linear are Inductor's to fuse with each other.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.rotated_linear import rotated_linear
from int8fx.passes.graph.mutation import Memory

_ADDITIONS = frozenset({operator.add, torch.add, "add", "__add__", torch.ops.aten.add.Tensor})
# The linears of ours, and which of their arguments is the bias.
_BIAS = {ops.int8_linear: 6, rotated_linear: 8}


def fuse_epilogue(graph: fx.Graph, memory: Memory) -> int:
    """Moves biases into the int8 linears of one graph; returns how many."""
    return sum(_of_operator(graph, memory, *each) for each in _BIAS.items())


def _of_operator(graph: fx.Graph, memory: Memory, target: Any, position: int) -> int:
    moved = 0
    for linear in graph.find_nodes(op="call_function", target=target):
        addition = next(iter(linear.users), None)
        if linear.args[position] is not None or addition is None or len(linear.users) != 1:
            continue
        bias = _bias_of(addition, linear)
        # It is read earlier than it was.
        if bias is None or memory.written_between(linear, addition, [bias]):
            continue
        addition.replace_all_uses_with(linear)
        graph.erase_node(addition)
        linear.update_arg(position, bias)
        moved += 1
    return moved


def _bias_of(addition: fx.Node, linear: fx.Node) -> fx.Node | None:
    """The 1-D operand of ``linear + bias``, if that is what ``addition`` computes."""
    if addition.target not in _ADDITIONS or addition.kwargs or len(addition.args) != 2:
        return None
    bias = addition.args[1] if addition.args[0] is linear else addition.args[0]
    # Only an input of the graph is sure to be there before the linear.
    if not isinstance(bias, fx.Node) or bias.op != "placeholder" or bias.users.keys() - {addition}:
        return None
    value, result = bias.meta.get("example_value"), linear.meta["example_value"]
    if not isinstance(value, Tensor):
        return None
    fits = tuple(value.shape) == (result.shape[-1],) and value.dtype == result.dtype
    return bias if fits else None
