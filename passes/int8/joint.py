"""Several calls of an operator that read one activation become one call of another operator.

Before::

    y1 = f(x, *how, w1, scale1, bias1)
    y2 = f(x, *how, w2, scale2, bias2)

After::

    y = fs(x, *how, [w1, w2], [scale1, scale2], [bias1, bias2])
    y1, y2 = y[0], y[1]

What a linear may lack, as its bias, the others of its call lack as well. All that the linears read has
to be there before the first of them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.arguments import argument
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import device_type

MOST = 64  # linears of one call


@dataclass(frozen=True)
class Joint:
    """Two operators.

    Attributes:
        one: that of a single linear.
        several: that of several; None: only a device's own is there.
        alike: the arguments that the linears of a call have in common.
        of_each: the arguments of ``one`` that ``several`` has a list of, and its names for them.
        alone: why a linear stays what it is, for reports.
        key: what else the linears of a call have in common.
    """

    one: Callable[..., Any]
    several: Callable[..., Any] | None
    alike: tuple[str, ...]
    of_each: Mapping[str, str]
    alone: str
    key: Callable[[fx.Node], tuple] = lambda linear: ()

    def join(
        self, graph: fx.Graph, context: Context, device: str, several: Any = None, most: int = MOST
    ) -> Result:
        """Joins the linears of one graph on one device; changed: how many calls they became.

        Args:
            several: the device's own operator, which takes a single linear as well.
            most: how many it takes.
        """
        result = Result()
        target = several or self.several
        for group in self._groups(graph, device, most, context.memory()):
            if len(group) == 1 and target is self.several:
                result.refuse(self.alone)
                continue
            self._join(graph, context.fake_mode, group, target)
            result.changed += 1
        return result

    def _groups(self, graph: fx.Graph, device: str, most: int, memory: Memory) -> list[list[fx.Node]]:
        """Linears that one call may take the place of, at the first of them."""
        order = {node: position for position, node in enumerate(graph.nodes)}
        open_groups: dict[tuple, list[fx.Node]] = {}
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for linear in graph.find_nodes(op="call_function", target=self.one):
            if device_type(argument(linear, "x")) != device:
                continue
            alike = (argument(linear, name) for name in self.alike)
            lacks = (argument(linear, name) is None for name in self.of_each)
            key = (*alike, *lacks, *self.key(linear))
            group = open_groups.get(key)
            if group is None or len(group) == most or not _fits(linear, group, order, memory):
                group = open_groups[key] = found[linear]
            group.append(linear)
        return list(found.values())

    def _join(self, graph: fx.Graph, fake_mode: Any, linears: list[fx.Node], target: Any) -> None:
        given = {name: argument(linears[0], name) for name in self.alike}
        for name, several in self.of_each.items():
            each = [argument(linear, name) for linear in linears]
            given[several] = [] if each[0] is None else each
        with graph.inserting_before(linears[0]):
            emit = Emitter(graph, fake_mode, linears[0])
            call = emit.named(target, **given)
            outputs = [emit.item(call, index) for index in range(len(linears))]
        for linear, y in zip(linears, outputs, strict=True):
            linear.replace_all_uses_with(y)
            graph.erase_node(linear)


def _fits(linear: fx.Node, group: list[fx.Node], order: dict[fx.Node, int], memory: Memory) -> bool:
    first, read = group[0], linear.all_input_nodes
    there = all(order[node] < order[first] for node in read)
    return there and not memory.written_between(first, linear, read)
