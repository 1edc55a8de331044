"""Fuse sums: partial results of a split product are added up by the kernel that reads them.

Before::

    y = int8fx.int8_linears_gpu(x, 6.0, "column", [w], [w_scale], [])
    z = residual + y[0]

After::

    y = int8fx.int8_linears_gpu(x, 6.0, "column", [w], [w_scale], [], False)
    z = residual + y[0]

Where a product has too few tiles for a GPU's processors, K is split among them. Inductor adds the
parts in whichever kernel it writes for the reader. It writes none where a result leaves the graph or a
library's kernel reads it; there the operator keeps its default and adds them up itself, which takes a
microsecond of its last programs, and not a launch.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.graph.weight_expression import is_view_or_cast

_ARGUMENT = "sums"
# What Inductor calls, and does not write.
_CALLED = frozenset(
    {
        F.linear,
        F.scaled_dot_product_attention,
        operator.matmul,
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.matmul,
        torch.mm,
        "addmm",
        "baddbmm",
        "bmm",
        "matmul",
        "mm",
    }
)


def fuse_sums(graph: fx.Graph) -> int:
    """Leaves sums to the readers where they take them for nothing; returns at how many calls."""
    left = 0
    for node in graph.nodes:
        position = _position(node.target)
        if position is not None and all(map(_is_written, _readers(node))):
            node.args = (*node.args[:position], False)
            left += 1
    return left


def _position(target: Any) -> int | None:
    """Where an operator takes whether it adds up by itself, as its last argument; or None."""
    schema = getattr(target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return len(names) - 1 if names[-1:] == [_ARGUMENT] else None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's values, views left out."""
    for user in node.users:
        if is_view_or_cast(user):
            yield from _readers(user)
        else:
            yield user


def _is_written(reader: fx.Node) -> bool:
    """Whether Inductor writes the kernel of a node."""
    return reader.op != "output" and reader.target not in _CALLED and _position(reader.target) is None
