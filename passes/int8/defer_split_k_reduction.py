"""Defer split-K reduction: the kernel that reads a split product adds up its parts.

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

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import set_argument, takes
from int8fx.passes.graph.weight_expression import is_view_or_cast

_ARGUMENT = "sums"  # whether an operator adds up by itself
_OF_PRODUCTS = (_ARGUMENT, "rotation")  # what one of our products takes
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


LEAVES = "a result leaves the graph"
CALLED = "a library's kernel reads a result"
NEXT_PRODUCT = "the next int8 product reads a result"


def defer_split_k_reduction(graph: fx.Graph, context: Context) -> Result:
    """Leaves sums to the readers where they take them for nothing; changed: at how many calls."""
    result = Result()
    for node in graph.nodes:
        if not takes(node.target, _ARGUMENT):
            continue
        reason = next((reason for each in _readers(node) if (reason := _reason(each))), "")
        if reason:
            result.refuse(reason)
        else:
            set_argument(node, _ARGUMENT, False)
            result.changed += 1
    return result


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's values, views left out."""
    for user in node.users:
        if is_view_or_cast(user):
            yield from _readers(user)
        else:
            yield user


def _reason(reader: fx.Node) -> str:
    """Why Inductor does not write the kernel of a node, or empty."""
    if reader.op == "output":
        return LEAVES
    if reader.target in _CALLED:
        return CALLED
    return NEXT_PRODUCT if any(takes(reader.target, name) for name in _OF_PRODUCTS) else ""
