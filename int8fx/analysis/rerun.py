"""A graph that is run many times, each time with another operator changed.

What comes before the first change is the same in every run, so it is computed once: the values that
are alive there are kept, and a run goes on from them. Walking through the changes in the order of the
graph, half of all operators are left out, and no more is held than what one run holds.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from int8fx import torch_private
from int8fx.weights.identity import State, state_of

# A context that a graph enters is a state beside its values: no run may begin inside of one.
ENTERS, EXITS = ("_enter_autocast",), ("_exit_autocast",)


class Rerun(fx.Interpreter):
    """Runs ``gm`` operator by operator, from where the result may differ from that of the last run.

    A graph that writes to its values is run from the beginning, always: the first run tells.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._nodes = list(gm.graph.nodes)
        self._places = _places(self._nodes)
        self._is_watched = True
        self._inputs: list[Any] = []
        self._states: list[State] = []
        self._at = 0

    def run_from(self, changed: Sequence[fx.Node], inputs: Sequence[Any]) -> Any:
        """The graph's output.

        Args:
            changed: the nodes that may compute something else than in the last runs; of all others the
                results depend on what they read alone.
        """
        first = min((self._places.get(node, 0) for node in changed), default=0)
        if not self._same(inputs) or self._at > first:
            self._at = 0
        if self._at == 0:
            self.env, self.args_iter = {}, iter(inputs)
        for node in self._nodes[self._at : first]:
            self._step(node)
        self._at = first
        unchanged, self.env = self.env, dict(self.env)
        try:
            for node in self._nodes[first:]:
                output = self._step(node)
        finally:
            self.env = unchanged
        self._is_watched = False
        return output

    def _same(self, inputs: Sequence[Any]) -> bool:
        """Whether these are the last run's inputs, unchanged."""
        before, states = self._inputs, self._states
        self._inputs = list(inputs)
        self._states = [state_of(each) for each in inputs if isinstance(each, Tensor)]
        return (
            len(before) == len(inputs)
            and all(one is other for one, other in zip(before, inputs, strict=True))
            and self._states == states
        )

    def _step(self, node: fx.Node) -> Any:
        value = self.env[node] = self._watched(node) if self._is_watched else self.run_node(node)
        for last_used in self.user_to_last_uses.get(node, ()):
            del self.env[last_used]
        return value

    def _watched(self, node: fx.Node) -> Any:
        try:
            given = torch_private.storages([self.env[each] for each in node.all_input_nodes])
        except NotImplementedError:  # of sparse tensors, whose storages are not to be had
            self._places = {}
            return self.run_node(node)
        with torch_private.recording_writes() as written:
            value = self.run_node(node)
        if not given.isdisjoint(written):
            self._places = {}
        return value


def _places(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Where a run may begin, by node: at the node itself, outside of every context."""
    places, depth = {}, 0
    for index, node in enumerate(nodes):
        if depth == 0 and node.op != "placeholder":
            places[node] = index
        name = getattr(node.target, "__name__", "")
        depth += (name in ENTERS) - (name in EXITS)
    return places
