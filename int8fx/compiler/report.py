"""Reports: what one compile decided, for people and for tests."""

import contextlib
import html
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from int8fx.passes.linears.decision import Decision, in_schemes
from int8fx.passes.outcome import Outcome

SHOWN = 3  # reasons, in a few lines


@dataclass(frozen=True, repr=False)
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

    ``print`` lists every linear; its ``repr`` is a few lines.

    Examples:
        >>> import int8fx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)
        >>> with int8fx.collect_reports() as reports:
        ...     _ = torch.compile(model, backend="llmint8")(torch.ones(2, 64))
        >>> reports
        [<Report: 1 of 1 linears and matmuls in llm.int8, 1 quantisations, weights 0.0 -> 0.0 MiB>]
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

    @property
    def headline(self) -> str:
        """Counts and bytes, in a line."""
        how = in_schemes(each.scheme for each in self.accepted)
        return (
            f"{len(self.accepted)} of {len(self.decisions)} linears and matmuls {how}, "
            f"{self.quantizations} quantisations, "
            f"weights {self.float_bytes / 2**20:.1f} -> {self.int8_bytes / 2**20:.1f} MiB"
        )

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why linears stay in float, and how many, the commonest first."""
        return Counter(each.reason for each in self.refused).most_common()

    def __repr__(self) -> str:
        left = "".join(f"\n {count} left: {reason}" for reason, count in self.reasons[:SHOWN])
        more = len(self.reasons) - SHOWN
        return f"<Report: {self.headline}{left}{f'; {more} more reasons' if more > 0 else ''}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(each.path)}</td><td>{html.escape(each.scheme or 'float')}</td>"
            f"<td>{html.escape(each.reason or each.note)}</td></tr>"
            for each in self.decisions
        )
        head = "<tr><th>module</th><th>scheme</th><th>reason</th></tr>"
        return f"<p>{html.escape(self.headline)}</p><table>{head}{rows}</table>"

    def __str__(self) -> str:
        head = self.headline
        unused = [f"  matches nothing in this graph: {pattern}" for pattern in self.unused]
        passes = [f"  pass {outcome}" for outcome in self.passes if not outcome.is_silent]
        return "\n".join([head, *(f"  {each}" for each in self.decisions), *unused, *passes])


_collectors: ContextVar[tuple[list[Report], ...]] = ContextVar("int8fx_reports", default=())


@contextlib.contextmanager
def collect_reports() -> Iterator[list[Report]]:
    """The reports of all graphs that are compiled inside the ``with`` block, as a growing list.

    Examples:
        >>> import int8fx, torch
        >>> compiled = torch.compile(torch.nn.Linear(64, 64).requires_grad_(False), backend="llmint8")
        >>> with int8fx.collect_reports() as reports:
        ...     _ = compiled(torch.ones(2, 64))
        >>> [decision.scheme for decision in reports[0].accepted]
        ['llm.int8']
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
