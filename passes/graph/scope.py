"""Graphs inside graphs: the bodies of higher-order operators, and how a value reaches them.

Dynamo lifts everything that a body reads into operands of its call::

    wrap_body_0 = self.wrap_body_0
    y = tag_activation_checkpoint(wrap_body_0, x, w, b, use_reentrant=False)

so a weight inside a body is a placeholder there, bound to an operand here. A ``Scope`` is one graph
with that binding; ``outer`` follows it, and ``lift`` carries a new outer value inside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class HigherOrder:
    """Where one higher-order operator keeps its bodies and the operands that all of them receive.

    Attributes:
        bodies: positions of the ``get_attr`` nodes of the bodies among the call's arguments.
        operands: ``args`` to the operands that become the placeholders of every body, in order.
        extend: ``(args, node)`` to args with one operand more, at the end.
    """

    bodies: tuple[int, ...]
    operands: Callable[[tuple], tuple]
    extend: Callable[[tuple, fx.Node], tuple]


_WRAPPED = HigherOrder((0,), lambda args: args[1:], lambda args, node: (*args, node))

HIGHER_ORDER: dict[str, HigherOrder] = {
    "tag_activation_checkpoint": _WRAPPED,
    "wrap": _WRAPPED,
    "wrap_activation_checkpoint": _WRAPPED,
    "cond": HigherOrder(
        (1, 2),
        lambda args: tuple(args[3]),
        lambda args, node: (*args[:3], type(args[3])((*args[3], node))),
    ),
    "while_loop": HigherOrder(
        (0, 1),
        lambda args: (*args[2], *args[3]),
        lambda args, node: (*args[:3], (*args[3], node)),
    ),
}


@dataclass(eq=False)
class Scope:
    """One graph, and the call that runs it (None for the outermost).

    ``closed`` says why nothing may be carried into it, for bodies of operators without a row above
    and bodies that several calls share.
    """

    gm: fx.GraphModule
    parent: "Scope | None" = None
    call: fx.Node | None = None
    children: list["Scope"] = field(default_factory=list)
    closed: str = ""
    _lifted: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def repeats(self) -> bool:
        """Whether its call runs it on its own results again."""
        return self.call is not None and _name(self.call) == "while_loop"

    def walk(self) -> Iterator["Scope"]:
        yield self
        for child in self.children:
            yield from child.walk()

    def outer(self, node: fx.Node) -> fx.Node | None:
        """What a placeholder of this graph is bound to in the parent's; None if unknown."""
        if self.parent is None or self.call is None or self.closed:
            return None
        operands = HIGHER_ORDER[_name(self.call)].operands(self.call.args)
        position = self.graph.find_nodes(op="placeholder").index(node)
        bound = operands[position] if position < len(operands) else None
        return bound if isinstance(bound, fx.Node) else None

    def lift(self, node: fx.Node) -> fx.Node:
        """The node of this graph that holds a value of the outermost graph."""
        if self.parent is None or self.call is None:
            return node
        if node not in self._lifted:
            inner = self.parent.lift(node)
            rule = HIGHER_ORDER[_name(self.call)]
            self.call.args = rule.extend(self.call.args, inner)
            for sibling in self.parent.children:
                if sibling.call is self.call:
                    sibling._lifted[node] = sibling._add_placeholder(node)
        return self._lifted[node]

    def _add_placeholder(self, node: fx.Node) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1:]
        with self.graph.inserting_after(last[0]) if last else self.graph.inserting_before():
            placeholder = self.graph.placeholder(node.name)
        placeholder.meta = dict(node.meta)
        return placeholder


def scopes(gm: fx.GraphModule) -> Scope:
    """The tree of graphs below ``gm``."""
    root = Scope(gm)
    _descend(root)
    return root


def _descend(scope: Scope) -> None:
    for call in scope.graph.nodes:
        if call.op != "call_function":
            continue
        rule = HIGHER_ORDER.get(_name(call))
        for position, argument in enumerate(call.args):
            body = _body(scope.gm, argument)
            if body is None:
                continue
            child = Scope(body, scope, call)
            if rule is None or position not in rule.bodies:
                child.closed = f"inside {_name(call)}, which weights cannot be carried into yet"
            elif len(argument.users) > 1:
                child.closed = f"inside a body that {len(argument.users)} calls share"
            elif scope.closed:
                child.closed = scope.closed
            scope.children.append(child)
            _descend(child)


def _body(gm: fx.GraphModule, argument: object) -> fx.GraphModule | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    body = getattr(gm, str(argument.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _name(call: fx.Node) -> str:
    return getattr(call.target, "__name__", str(call.target))
