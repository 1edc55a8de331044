"""Fold biases: a bias that the model adds after its matmul moves into the int8 linear.

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
from torch import fx

from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.rotated_linear import rotated_linear
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument, set_argument
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import rank_of, tensor_of

LINEARS = (ops.int8_linear, rotated_linear)
_ADDITIONS = frozenset({operator.add, torch.add, "add", "__add__", torch.ops.aten.add.Tensor})

READ_WITHOUT = "the product is read without the bias as well"
SCALED = "the bias is added with a factor"
COMPUTED = "the bias is computed in the graph"
READ_ELSEWHERE = "the bias is read elsewhere as well"
MISFIT = "what is added is no vector of the result's N and dtype"
WRITTEN = "the graph writes to the bias before it is added"


def fold_biases(graph: fx.Graph, context: Context) -> Result:
    """Moves biases into the int8 linears of one graph; changed: how many."""
    memory, result = context.memory(), Result()
    for linear in [node for node in graph.nodes if node.target in LINEARS]:
        addition, vector = _added_vector(linear)
        if addition is None or argument(linear, "bias") is not None:
            continue
        reason = _reason(linear, addition, vector, memory)
        if reason:
            result.refuse(reason)
            continue
        addition.replace_all_uses_with(linear)
        graph.erase_node(addition)
        set_argument(linear, "bias", vector)
        result.changed += 1
    return result


def _added_vector(linear: fx.Node) -> tuple[fx.Node | None, Any]:
    """The addition of a vector to a product, and the vector; a residual, for one, is none."""
    for addition in linear.users:
        if addition.target not in _ADDITIONS or len(addition.args) != 2:
            continue
        left, right = addition.args
        other = right if left is linear else left
        if rank_of(other) == 1:
            return addition, other
    return None, None


def _reason(linear: fx.Node, addition: fx.Node, bias: fx.Node, memory: Memory) -> str:
    """Why a vector is not folded, or empty."""
    value, result = tensor_of(bias), linear.meta["example_value"]
    assert value is not None
    if len(linear.users) != 1:
        return READ_WITHOUT
    if addition.kwargs:
        return SCALED
    if value.shape[0] != result.shape[-1] or value.dtype != result.dtype:
        return MISFIT
    # Only an input of the graph is sure to be there before the linear.
    if bias.op != "placeholder":
        return COMPUTED
    if bias.users.keys() - {addition}:
        return READ_ELSEWHERE
    # It is read earlier than it was.
    return WRITTEN if memory.written_between(linear, addition, [bias]) else ""
