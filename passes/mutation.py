"""Writes: which nodes of a graph change a tensor in place."""

import operator
from collections.abc import Iterator

from torch import fx

from int8fx.passes.weight_expression import is_view_or_cast

_INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift setitem copy_".split()
)
# Python calls them so because their names are keywords.
_KEYWORDS = frozenset((operator.and_, operator.or_, operator.not_, operator.is_))


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node may overwrite one of its arguments. Says yes when in doubt."""
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.op != "call_function" or node.target in _KEYWORDS:
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = getattr(node.target, "__name__", "")
    if name in _INPLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__")


def written(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that are written to: the arguments of in-place calls, and what these are views of."""
    for node in graph.nodes:
        if writes_in_place(node):
            target = node.kwargs.get("out") or (node.args[0] if node.args else None)
            while isinstance(target, fx.Node):
                yield target
                target = target.args[0] if is_view_or_cast(target) else None
