"""What a pass is: a name, a rewrite of one graph, and when it applies.

    rewrite(graph, context) -> Result      how many places it changed, and why it left others
    applies(context) -> str                empty, or why the pass does not run at all

``passes/order.py`` is the table of all passes, ``passes/README.md`` says how to add one. A pass learns
about the compile from its ``Context`` alone, so that a test can run it on a graph of a few nodes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.scope import Scope
from int8fx.passes.graph.verify import Signature
from int8fx.passes.linears.candidate import Accepted
from int8fx.passes.outcome import Outcome


@dataclass
class Result:
    """What a pass did to one graph.

    Attributes:
        changed: how many places it rewrote; the pass says what it counts.
        refused: of the places that it looked at and left: why, and how many.
    """

    changed: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, count: int = 1) -> None:
        if count:
            self.refused[reason] += count

    def add(self, other: "Result") -> None:
        self.changed += other.changed
        self.refused.update(other.refused)


@dataclass
class Context:
    """What the passes of one compile ask, and what they tell.

    Attributes:
        fake_mode: of the graphs' values.
        find_memory: where all graphs write to, as they are at the call.
        devices: the types of the devices of the graph's inputs.
        needs_autograd: whether a backward pass may come: most operators of int8fx have none.
        for_inductor: whether Inductor compiles the graphs; else they run operator by operator.
        cpp_wrapper: whether Inductor writes its wrapper in C++.
        quantizers: the operators whose equal calls the linears of one input share.
        joined, normed, experts, attends: what serves on a type of device (``kernels/table.py``).
        joined_rotated, normed_rotated: the same of rows that are rotated.
        joined_by: the same as ``joined`` of an operator, a type of device and a family of weights.
        accepted: the linears that are rewritten, in the order in which they run.
        root: the outermost graph.
        length_now: of a size that varies, what it is in the call that is compiled for; None: not known.
        makes_constants: whether a graph of these values makes constants that are not written out.
        subgraph_call: the operator that calls a sub-graph, which Inductor compiles once for all calls.
        signatures: for ``verify``: of each rewritten node, what it was and what it is.
        quantizations: how many calls quantise an input, once linears share them.
    """

    fake_mode: Any
    find_memory: Callable[[], Memory]
    devices: tuple[str, ...] = ()
    needs_autograd: bool = False
    for_inductor: bool = True
    cpp_wrapper: bool = False
    quantizers: frozenset[Any] = frozenset()
    joined: Callable[[str], tuple[Any, int] | None] = lambda device: None
    normed: Callable[[str], Any] = lambda device: None
    joined_rotated: Callable[[str], tuple[Any, int] | None] = lambda device: None
    joined_by: Callable[[str, str, str], tuple[Any, int] | None] = lambda operator, device, family: None
    normed_rotated: Callable[[str], Any] = lambda device: None
    experts: Callable[[str], Any] = lambda device: None
    attends: Callable[[str, bool], bool] = lambda device, few: False
    accepted: Sequence[Accepted] = ()
    root: fx.Graph | None = None
    length_now: Callable[[torch.SymInt], int | None] = lambda size: None
    makes_constants: Callable[[fx.GraphModule, Sequence[Any]], bool] = lambda gm, values: False
    subgraph_call: Any = None
    signatures: list[tuple[fx.Node, Signature, Signature]] = field(default_factory=list)
    quantizations: int = 0
    _memory: Memory | None = None

    def memory(self) -> Memory:
        """Where the graphs write to, as they were when the pass began, or before, if to nothing."""
        # What a pass does to one graph changes nothing in another: it is found once a pass.
        if self._memory is None:
            self._memory = self.find_memory()
        return self._memory

    def memory_now(self) -> Memory:
        """The memory of the graphs with what the passes put there."""
        return self.find_memory()

    def begin(self) -> None:
        """A pass begins: what the one before found may no longer be so."""
        # No pass adds a write to graphs without one.
        if self._memory is not None and self._memory.is_written:
            self._memory = None


def _always(context: Context) -> str:
    return ""


@dataclass(frozen=True)
class Pass:
    """A row of ``passes/order.py``.

    Attributes:
        name: the same in the code, the log, the report, ``explain`` and the documentation.
        rewrite: changes one graph in place; sub-graphs are graphs of their own.
        applies: why the pass does not run in a compile, or empty.
    """

    name: str
    rewrite: Callable[[fx.Graph, Context], Result]
    applies: Callable[[Context], str] = _always

    def run(self, root: Scope, context: Context) -> Outcome:
        """Rewrites every graph below ``root``."""
        if skipped := self.applies(context):
            return Outcome(self.name, skipped=skipped)
        context.begin()
        changed, refused = 0, Counter[str]()
        for scope in root.walk():
            result = self.rewrite(scope.graph, context)
            changed += result.changed
            refused += result.refused
        return Outcome(self.name, changed, dict(refused.most_common()))
