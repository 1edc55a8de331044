"""Reports: what one compile decided, for people and for tests."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from int8fx.passes.linears.decision import Decision
from int8fx.passes.outcome import Outcome


@dataclass(frozen=True)
class Report:
    """The outcome of compiling one graph.

    Attributes:
        decisions: one for every linear or matmul in the graph, in the order in which they run.
        kernel: what computes the int8 linears, by device type.
        graph: the rewritten graph as Python, before autograd and Inductor.
        original: the graph as Dynamo gave it.
        quantizations: how many inputs are quantised (linears that read one input share it).
        float_bytes, int8_bytes: of the rewritten weights, before and after, scales included.
        passes: what each pass of ``passes/order.py`` changed, and why it left the rest; empty where no
            linear is in int8.
        unused: patterns of ``skip``, ``only`` and ``rules`` that decide on nothing in this graph.
    """

    decisions: tuple[Decision, ...]
    kernel: dict[str, str]
    graph: str
    original: str
    quantizations: int
    float_bytes: int
    int8_bytes: int
    unused: tuple[str, ...] = ()
    passes: tuple[Outcome, ...] = ()

    @property
    def accepted(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.accepted]

    @property
    def refused(self) -> list[Decision]:
        return [decision for decision in self.decisions if not decision.accepted]

    def __str__(self) -> str:
        head = (
            f"{len(self.accepted)} of {len(self.decisions)} linears and matmuls in int8, "
            f"{self.quantizations} quantisations, "
            f"weights {self.float_bytes / 2**20:.1f} -> {self.int8_bytes / 2**20:.1f} MiB"
        )
        unused = [f"  matches nothing in this graph: {pattern}" for pattern in self.unused]
        passes = [f"  pass {outcome}" for outcome in self.passes if not outcome.is_silent]
        return "\n".join([head, *(f"  {each}" for each in self.decisions), *unused, *passes])


_collectors: ContextVar[tuple[list[Report], ...]] = ContextVar("int8fx_reports", default=())


@contextlib.contextmanager
def collect_reports() -> Iterator[list[Report]]:
    """The reports of all graphs that are compiled inside the ``with`` block, as a growing list::

    with int8fx.collect_reports() as reports:
        compiled(x)
    print(reports[0])
    """
    collected: list[Report] = []
    token = _collectors.set((*_collectors.get(), collected))
    try:
        yield collected
    finally:
        _collectors.reset(token)


def publish(report: Report) -> None:
    for collector in _collectors.get():
        collector.append(report)
