"""Memory: which values of a graph share it, and where the graph writes to it.

    v = w.diagonal();   v.zero_();   y = linear(x, w)              w is written, though no call says so

A pass that reads a value at another place than the model did asks here whether it is the same there.
What one call does is found out by running it (``int8fx/compiler/effects.py``): no list of views or of
in-place
operators has to be complete. Values that share memory are one set, of all graphs together: a view is in
the set of its base, an operand of a sub-graph in that of the placeholder that it is bound to. The sets
are too large when in doubt, never too small.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from int8fx.passes.graph.scope import Scope
from int8fx.passes.graph.transforms import WRAPS


@dataclass(frozen=True)
class Effect:
    """What a call does to the values of ``node.all_input_nodes``, by their positions there.

    Attributes:
        writes: those that it may write to.
        shares: those that may share memory with its result, or with each other, once it ran.
        doubt: why that is not known, so that all of them are named; or empty.
    """

    writes: frozenset[int] = frozenset()
    shares: frozenset[int] = frozenset()
    doubt: str = ""


_INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift setitem copy_".split()
)
# Python calls them so because their names are keywords.
_KEYWORDS = frozenset((operator.and_, operator.or_, operator.not_, operator.is_))


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call names itself one that overwrites an argument.

    It cannot tell of a positional ``inplace``, nor what else a Python function does: see ``Memory``.
    """
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


def declared_effect(node: fx.Node, doubt: str, shares: frozenset[int] | None = None) -> Effect:
    """The most that a call may do, by its name and schema: for what cannot be run.

    Args:
        doubt: why it cannot.
        shares: what the result shares memory with if the call writes to nothing; None: all.
    """
    everything = frozenset(range(len(node.all_input_nodes)))
    if _declares_no_write(node):
        return Effect(shares=everything if shares is None else shares)
    return Effect(everything, everything, doubt)


def _declares_no_write(node: fx.Node) -> bool:
    if writes_in_place(node):
        return False
    if node.op == "call_method" or hasattr(node.target, "_schema"):
        return True
    module, name = (getattr(node.target, key, None) or "" for key in ("__module__", "__name__"))
    if module in ("_operator", "builtins") or ("_functorch" in module and name in WRAPS):
        return True
    # Functions in C++ are named after the operator that they call, and have no flag ``inplace``; so are
    # those of torch.functional.
    in_python = hasattr(node.target, "__code__") and module != "torch.functional"
    packet = None if in_python else getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = (getattr(packet, each) for each in packet.overloads())
    return not any(
        each._schema.is_mutable for each in overloads if "out" not in str(each).split(".")[-1]
    )


class Memory:
    """Of the graphs below ``root`` as they are now: whoever rewrites them asks a new one."""

    def __init__(
        self,
        root: Scope,
        effect_of: Callable[[fx.Node], Effect],
        overlapping: Iterable[Sequence[fx.Node]] = (),
    ) -> None:
        """
        Args:
            effect_of: a call of a graph to its effect.
            overlapping: placeholders of the outermost graph whose tensors share memory.
        """
        self._parents: dict[fx.Node, fx.Node] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}  # by call
        self._doubts: dict[fx.Node, str] = {}
        for group in overlapping:
            self._join(*group)
        scopes = list(root.walk())
        for scope in scopes:
            self._add(scope, effect_of)
        for scope in reversed(scopes):  # a body before the call that it belongs to
            if scope.call is not None:
                written = (each for node in scope.graph.nodes for each in self._written.get(node, ()))
                self._written.setdefault(scope.call, []).extend(written)
        self._writes = {
            call: frozenset(map(self._set_of, written))
            for call, written in self._written.items()
            if written
        }

    @property
    def is_written(self) -> bool:
        """Whether anything is."""
        return bool(self._writes)

    def share(self, left: fx.Node, right: fx.Node) -> bool:
        """Whether two values may have memory in common; of what a pass put there since, any may."""
        if left not in self._parents or right not in self._parents:
            return True
        return self._set_of(left) is self._set_of(right)

    def writes(self, call: fx.Node) -> bool:
        """Whether a call may write to memory."""
        return call in self._writes

    def writers(self, value: fx.Node) -> list[fx.Node]:
        """The calls that may write to a value's memory, at any time."""
        memory = self._set_of(value)
        return [call for call, written in self._writes.items() if memory in written]

    def doubt(self, call: fx.Node) -> str:
        """Why it is not known what a call writes to, or empty."""
        return self._doubts.get(call, "")

    def written_between(self, start: fx.Node, end: fx.Node, values: Iterable[fx.Node]) -> bool:
        """Whether a call after ``start`` and before ``end`` may write to one of the values.

        What a pass put into the graph since is a value that anything may write to, and a call that
        writes to nothing.
        """
        if not self._writes:
            return False
        values = list(values)
        known = {self._set_of(value) for value in values if value in self._parents}
        all_known = all(value in self._parents for value in values)
        node = start.next
        while node is not end:
            written = self._writes.get(node)
            if written and (not all_known or not known.isdisjoint(written)):
                return True
            node = node.next
        return False

    def _add(self, scope: Scope, effect_of: Callable[[fx.Node], Effect]) -> None:
        bodies: dict[fx.Node, list[Scope]] = {}
        for child in scope.children:
            assert child.call is not None
            bodies.setdefault(child.call, []).append(child)
        attributes: dict[str, fx.Node] = {}
        for node in scope.graph.nodes:
            self._join(node)
            if node in bodies:
                for body in bodies[node]:
                    self._bind(body, node)
            elif node.op.startswith("call"):
                self._record(node, effect_of(node))
            elif node.op == "get_attr":
                self._join(node, attributes.setdefault(str(node.target), node))

    def _record(self, node: fx.Node, effect: Effect) -> None:
        inputs = node.all_input_nodes
        self._join(node, *(inputs[position] for position in effect.shares))
        self._written[node] = [inputs[position] for position in effect.writes]
        if effect.doubt:
            self._doubts[node] = effect.doubt

    def _bind(self, body: Scope, call: fx.Node) -> None:
        """A body's placeholders are its call's operands, and its results the call's."""
        placeholders = body.graph.find_nodes(op="placeholder")
        self._join(call, *body.graph.output_node().all_input_nodes)
        if body.closed or body.repeats:
            self._join(call, *call.all_input_nodes, *placeholders)
            return
        for placeholder in placeholders:
            self._join(placeholder, body.outer(placeholder) or call)

    def _join(self, first: fx.Node, *others: fx.Node) -> None:
        memory = self._set_of(first)
        for other in others:
            self._parents[self._set_of(other)] = memory

    def _set_of(self, node: fx.Node) -> fx.Node:
        """The node that stands for all that share its memory."""
        top = self._parents.setdefault(node, node)
        while self._parents[top] is not top:
            top = self._parents[top]
        self._parents[node] = top
        return top
