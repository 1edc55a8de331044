"""Fuse norms: a norm that only int8 linears read moves into their operator, and the sum before it.

Before::

    s = residual + y0
    h = rms_norm(s, weight)                    (also spelled out, ``norms.py``)
    y = int8fx.int8_linears_gpu(h, 6.0, "column", [w], [w_scale], [])

After::

    y = int8fx.normed_linears_gpu(
        y0, residual, "rms", weight, None, eps, 6.0, "column", [w], [w_scale], []
    )
    s = y[1]

For 17 rows and more h then never is in memory (``kernels/gpu/norm.py``). Left to Inductor: rows few
enough for its own kernel; a norm that something else reads as well; and one of a value that nobody
else needs, which Inductor computes on the way, and would have to write for our kernel to read.

The same of ``int8fx.rotated_linears_gpu``, for any number of rows: Inductor has no rotation, so what it
computes in front of one has to be written in any case.
"""

import math
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.kernels.ops.limits import DECODE_ROWS
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument, given, takes
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import shape_of, tensor_of
from int8fx.passes.int8.norms import Norm, norm_of

_VIEWS = ("view", "reshape")

READ_ELSEWHERE = "something else reads the norm as well"
FEW = f"{DECODE_ROWS} rows or fewer are quantised by Inductor's kernel of the norm"
NO_OUTLIERS = "the linears have no outliers to take out"
SUM_ON_THE_WAY = "the sum before the norm is not of two tensors in memory"
SUM_IN_FP32 = "the sum before the norm is normalised in fp32, and rounded for others"
ON_THE_WAY = "what is normalised is computed on the way, and not in memory"
WRITTEN = "the graph writes to what the norm or its linears read"


def fuse_norms(graph: fx.Graph, context: Context) -> Result:
    """Moves the norms of one graph; changed: how many."""
    memory, result = context.memory(), Result()
    for joined, normed in _operators(context):
        for call in graph.find_nodes(op="call_function", target=joined[0]):
            h, lead = _below_view(argument(call, "x"))
            norm = norm_of(h)
            if norm is None:
                continue
            reason = _reason(norm, h, call, memory) if isinstance(norm, Norm) else norm
            if reason:
                result.refuse(reason)
                continue
            assert isinstance(norm, Norm)
            _move(context.fake_mode, call, h, norm, lead, normed)
            result.changed += 1
    return result


def _operators(context: Context) -> Iterator[tuple[tuple[Any, int], Any]]:
    """Of each device: an operator of linears, and the one that takes a norm as well."""
    pairs = (context.joined, context.normed), (context.joined_rotated, context.normed_rotated)
    for device in context.devices:
        for joined, normed in pairs:
            found = joined(device), normed(device)
            if found[0] is not None and found[1] is not None:
                yield found[0], found[1]


def _reason(norm: Norm, h: fx.Node, call: fx.Node, memory: Memory) -> str:
    """Why a norm that linears read stays where it is, or empty."""
    if not _is_alone(h, call):
        return READ_ELSEWHERE
    if reason := _no_gain(norm, call):
        return reason
    return WRITTEN if memory.written_between(norm.x, call, _read(norm, call)) else ""


def _below_view(x: Any) -> tuple[fx.Node, tuple | None]:
    """What a linear's rows are a view of, and the sizes of the view before its last."""
    if x.op == "call_method" and x.target in _VIEWS and shape_of(x.args[0]) is not None:
        *lead, last = x.args[1] if isinstance(x.args[1], tuple | list) else x.args[1:]
        if last == shape_of(x.args[0])[-1] == shape_of(x)[-1]:
            return x.args[0], tuple(lead)
    return x, None


def _is_alone(h: fx.Node, call: Any) -> bool:
    """Whether nothing else reads a norm, or the view of it that the linears read."""
    x = argument(call, "x")
    return set(x.users) == {call} and set(h.users) <= {call, x}


def _no_gain(norm: Norm, call: Any) -> str:
    """Why Inductor does as well with the norm, or empty."""
    if takes(call.target, "rotation"):
        return ""
    *lead, _ = shape_of(norm.x)
    rows = math.prod(lead)
    if isinstance(rows, int) and rows <= DECODE_ROWS:
        return FEW
    if argument(call, "threshold") == 0 or argument(call, "decomposition") not in ("column", "token"):
        return NO_OUTLIERS
    if _is_sum(_below_dropout(norm.x)):
        if _dtype(norm.x) != _dtype(argument(call, "x")):
            return SUM_IN_FP32
        return "" if _addends(norm) is not None else SUM_ON_THE_WAY
    return "" if _is_stored(norm.x, norm.nodes) else ON_THE_WAY


def _read(norm: Norm, call: fx.Node) -> set[fx.Node]:
    """What the norm, the sum before it and the linears read, or compute on the way."""
    return {norm.x, *norm.x.all_input_nodes, *norm.nodes, *call.all_input_nodes} | {
        read for node in norm.nodes for read in node.all_input_nodes
    }


def _dtype(x: Any) -> torch.dtype | None:
    value = tensor_of(x)
    return None if value is None else value.dtype


def _is_sum(x: fx.Node) -> bool:
    return x.target in (operator.add, "add")


def _addends(norm: Norm) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a norm's input is the sum of, where both are in memory anyway."""
    x: Any = norm.x
    if not _is_sum(x) or x.kwargs or len(x.args) != 2:
        return None
    left, right = x.args
    value = tensor_of(x)
    for each in (left, right):
        other = tensor_of(each)
        if other is None or value is None or other.shape != value.shape or other.dtype != value.dtype:
            return None
        if not _is_stored(each, frozenset({x})):
            return None
    return left, right


def _is_stored(x: Any, readers: frozenset[fx.Node]) -> bool:
    """Whether a value is written to memory whatever becomes of ``readers``."""
    is_result = x.target is operator.getitem and tensor_of(x.args[0]) is None  # of an operator's list
    if x.op == "placeholder" or is_result or x.users.keys() - readers:
        return True
    is_view = x.op == "call_method" and x.target in _VIEWS
    below = x.args[0] if is_view else _below_dropout(x)
    return below is not x and _is_stored(below, frozenset({x}))


def _below_dropout(x: Any) -> Any:
    """What a node drops nothing from, or the node."""
    if x.target is not F.dropout:
        return x
    given = dict(zip(("input", "p", "training"), x.args, strict=False)) | x.kwargs
    return given["input"] if given.get("training", True) is False else x


def _move(
    fake_mode: Any, call: fx.Node, h: fx.Node, norm: Norm, lead: tuple | None, normed: Any
) -> None:
    graph, read = call.graph, given(call)
    h_viewed = read.pop("x")
    addends = _addends(norm)
    x, addend = addends or (norm.x, None)
    # What was read is read no later. A sum is made where it was: others may read it before the linears.
    with graph.inserting_before(norm.x.next if addends else h):
        emit = Emitter(graph, fake_mode, call)
        vectors = {"norm_weight": norm.weight, "norm_bias": norm.bias}
        made = emit.named(normed, x=x, addend=addend, norm=norm.kind, **vectors, eps=norm.eps, **read)
        # The sum comes after the linears' results.
        total = emit.item(made, len(read["weights"])) if addends else None
    with graph.inserting_before(call):
        for item in list(call.users):
            y = emit.item(made, item.args[1])  # type: ignore[arg-type]
            if lead is not None:
                y = emit.method("view", y, *lead, shape_of(y)[-1])
            item.replace_all_uses_with(y)
            graph.erase_node(item)
    _erase_unread(graph, {call, h_viewed, *norm.nodes})
    if total is not None:
        norm.x.replace_all_uses_with(total)
        graph.erase_node(norm.x)


def _erase_unread(graph: fx.Graph, nodes: Collection[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in nodes and not node.users:
            graph.erase_node(node)
