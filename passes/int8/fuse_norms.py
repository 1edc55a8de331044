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
"""

import math
import operator
from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import fx

from int8fx.kernels.ops.limits import DECODE_ROWS
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import shape_of, tensor_of
from int8fx.passes.int8.norms import Norm, norm_of

_VIEWS = ("view", "reshape")


def fuse_norms(graph: fx.Graph, fake_mode: Any, reader: Any, normed: Any, memory: Memory) -> int:
    """Moves the norms of one graph; returns how many.

    Args:
        reader: the operator that reads them.
        normed: the one that takes the place of both.
    """
    moved = 0
    for call in graph.find_nodes(op="call_function", target=reader):
        h, lead = _below_view(call.args[0])
        norm = norm_of(h)
        if norm is None or not _is_alone(h, call) or not _pays(norm, call):
            continue
        if not memory.written_between(norm.x, call, _read(norm, call)):
            _move(graph, fake_mode, call, h, norm, lead, normed)
            moved += 1
    return moved


def _below_view(x: Any) -> tuple[fx.Node, tuple | None]:
    """What a linear's rows are a view of, and the sizes of the view before its last."""
    if x.op == "call_method" and x.target in _VIEWS and shape_of(x.args[0]) is not None:
        *lead, last = x.args[1] if isinstance(x.args[1], tuple | list) else x.args[1:]
        if last == shape_of(x.args[0])[-1] == shape_of(x)[-1]:
            return x.args[0], tuple(lead)
    return x, None


def _is_alone(h: fx.Node, call: Any) -> bool:
    """Whether nothing else reads a norm, or the view of it that the linears read."""
    return set(call.args[0].users) == {call} and set(h.users) <= {call, call.args[0]}


def _pays(norm: Norm, call: Any) -> bool:
    *lead, _ = shape_of(norm.x)
    rows = math.prod(lead)
    # Few rows are quantised by the kernel that multiplies them (``kernels/gpu/decode.py``).
    if isinstance(rows, int) and rows <= DECODE_ROWS:
        return False
    _, threshold, decomposition, *_ = call.args
    if threshold == 0 or decomposition not in ("column", "token"):
        return False
    if _is_sum(_below_dropout(norm.x)):
        return _addends(norm) is not None
    return _is_stored(norm.x, norm.nodes)


def _read(norm: Norm, call: fx.Node) -> set[fx.Node]:
    """What the norm, the sum before it and the linears read, or compute on the way."""
    return {norm.x, *norm.x.all_input_nodes, *norm.nodes, *call.all_input_nodes} | {
        read for node in norm.nodes for read in node.all_input_nodes
    }


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
    is_result = x.target is operator.getitem and tensor_of(x.args[0]) is None  # of one of ours
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
    graph: fx.Graph,
    fake_mode: Any,
    call: Any,
    h: fx.Node,
    norm: Norm,
    lead: tuple | None,
    normed: Any,
) -> None:
    addends = _addends(norm)
    x, addend = addends or (norm.x, None)
    # What was read is read no later. A sum is made where it was: others may read it before the linears.
    with graph.inserting_before(norm.x.next if addends else h):
        emit = Emitter(graph, fake_mode, call)
        given = (x, addend, norm.kind, norm.weight, norm.bias, norm.eps, *call.args[1:])
        made = emit.call(normed, *given)
        # The sum comes after the linears' results.
        total = emit.item(made, len(call.args[3])) if addends else None
    with graph.inserting_before(call):
        for item in list(call.users):
            y = emit.item(made, item.args[1])
            if lead is not None:
                y = emit.method("view", y, *lead, shape_of(y)[-1])
            item.replace_all_uses_with(y)
            graph.erase_node(item)
    _erase_unread(graph, {call, call.args[0], *norm.nodes})
    if total is not None:
        norm.x.replace_all_uses_with(total)
        graph.erase_node(norm.x)


def _erase_unread(graph: fx.Graph, nodes: Collection[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in nodes and not node.users:
            graph.erase_node(node)
