"""A linear or matmul that was found, in one form whatever its spelling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from int8fx.passes.graph.scope import Scope
from int8fx.passes.graph.weight_expression import Step, WeightExpression
from int8fx.passes.linears.experts import Routing

Steps = tuple[Step, ...]


def method(name: str, *args: Any) -> Step:
    return Step("call_method", name, args, ())


@dataclass(eq=False)
class Candidate:
    """One linear or matmul of the model.

    Attributes:
        node: what computes it now, in ``scope``.
        spelling: as the model wrote it, for people.
        x: the activation; ``x_steps`` bring it to ``[*, K]``.
        weight: ``[N, K]`` once evaluated, or ``[E, N, K]`` with a routing; None when no operand is
            a weight.
        routing: which of a batch of matrices a row meets, or None.
        factors: both operands of a product of two activations, or None.
        bias: 1-D, or None.
        addend: what is added to the result and is no 1-D bias.
        y_steps: bring ``[*, N]`` to the node's shape.
        refusal: why this is no linear map of one activation, or empty.
    """

    node: fx.Node
    scope: Scope
    spelling: str
    x: fx.Node | None = None
    x_steps: Steps = ()
    weight: WeightExpression | None = None
    bias: fx.Node | None = None
    addend: fx.Node | None = None
    y_steps: Steps = ()
    refusal: str = ""
    routing: Routing | None = None
    factors: tuple[fx.Node, fx.Node] | None = None

    def rebind(self, replaced: Mapping[fx.Node, fx.Node]) -> None:
        """Follows operands to the nodes that took their place."""
        for name in ("x", "bias", "addend"):
            node = getattr(self, name)
            setattr(self, name, replaced.get(node, node))
        if self.factors is not None:
            left, right = self.factors
            self.factors = replaced.get(left, left), replaced.get(right, right)

    @property
    def operands(self) -> set[fx.Node]:
        """The values in its graph that its rewritten form reads."""
        routing = () if self.routing is None else (self.routing.ends, self.routing.index)
        read = (self.x, self.bias, self.addend, *routing, *(self.factors or ()))
        return {node for node in read if node is not None}

    def passed_over(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes that nothing reads for it any more: its weight and what was made of it, and what
        was made of other operands alone."""
        assert self.weight is not None
        read = self.operands
        of_weight: set[fx.Node] = {self.weight.placeholder}
        of_others: set[fx.Node] = set()

        def is_of_weight(node: fx.Node, scope: Scope) -> bool:
            if node in of_weight:
                return True
            if node in read:
                return False
            below = [(each, scope) for each in node.all_input_nodes]
            if node.op == "placeholder" and scope.parent is not None:
                outer = scope.outer(node)
                below = [] if outer is None else [(outer, scope.parent)]
            found = [each for each in below if is_of_weight(*each)]
            (of_weight if found else of_others).add(node)
            return bool(found)

        for operand in self.node.all_input_nodes:
            is_of_weight(operand, self.scope)
        return of_weight, of_others

    def refused(self, reason: str) -> "Candidate":
        self.refusal = reason
        return self


# (call, x, tensors of the weight, bias) -> y, all of them nodes; ``kernels/schemes/scheme.py`` has the
# schemes'
Product = Callable[[Callable[..., Any], fx.Node, Sequence[fx.Node], fx.Node | None], fx.Node]


@dataclass(frozen=True, eq=False)
class Accepted:
    """A candidate that is rewritten, and into what.

    Attributes:
        weight: the parts of its packed weight, placeholders of the outermost graph; empty where both
            operands are activations.
        product: emits ``y [*, N]`` of x's dtype from ``x [*, K]``; None where both are activations.
    """

    candidate: Candidate
    weight: Sequence[fx.Node] = ()
    product: Product | None = None
