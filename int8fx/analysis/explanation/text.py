"""Findings as text for a terminal of 80 columns."""

import io
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from int8fx.analysis.explanation.record import (
    Findings,
    Row,
    cells,
    kind_cells,
    mib,
    notes,
    pass_rows,
)
from int8fx.module_path import ModulePath
from int8fx.passes.outcome import Outcome

WIDTH = 80


def as_text(shown: RenderableType) -> str:
    """What a terminal of 80 columns shows, without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def row_table(explanation: Findings) -> Table:
    table = _columns("module", ("N x K", "scheme", "outliers", "SQNR", "MiB", "FLOPs"))
    for row in explanation.rows:
        name: RenderableType = ModulePath(row.path)
        if below := notes(row):
            name = Group(name, Padding(Text(below, style="dim"), (0, 0, 0, 2)))
        table.add_row(name, *cells(row).values())
    return table


def kind_table(rows: Sequence[Row]) -> Table:
    table = _columns("modules", ("count", "scheme", "max |x|", "min SQNR", "MiB", "FLOPs"))
    for each in kind_cells(rows):
        name, *others = each.values()
        table.add_row(ModulePath(name), *map(escape, others))
    return table


def _columns(first: str, others: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def pass_table(passes: Sequence[Outcome]) -> Table:
    """What the passes do to the graphs, and where they hold back."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("pass", no_wrap=True)
    table.add_column("changed", justify="right", no_wrap=True)
    table.add_column("left", overflow="fold")
    for row in pass_rows(passes):
        table.add_row(*map(escape, row))
    return table


def legend(explanation: Findings) -> str:
    """What the columns of the rows' table are."""
    outliers = (
        f"outliers: columns/elements with |x| >= {explanation.threshold:g}"
        if explanation.threshold
        else "no decomposition"
    )
    return f"{outliers}; SQNR: dB against float; MiB: before>after; FLOPs: of all"


def sentences(explanation: Findings) -> list[str]:
    """The totals and what went wrong, a line each."""
    totals = explanation.totals
    lines = [
        f"{totals.accepted} of {totals.candidates} linears and matmuls quantised, "
        f"{totals.accepted_share:.1%} of {totals.flops / 1e9:,.1f} GFLOPs",
        f"their weights: {mib(totals.float_bytes)} -> {mib(totals.kept_bytes)} MiB; "
        f"in float stay {mib(totals.left_bytes)} MiB of other linears",
    ]
    if totals.model_bytes:
        after = totals.model_bytes - totals.float_bytes + totals.kept_bytes
        lines.append(f"the whole model: {mib(totals.model_bytes)} -> {mib(after)} MiB")
    breaks = [f"graph break at {each.where}: {each.reason}" for each in explanation.graph_breaks]
    lines.append(
        f"{explanation.graphs} graph{'s' if explanation.graphs != 1 else ''}, "
        f"{len(breaks)} graph breaks, {len(explanation.recompiles)} recompiles"
    )
    lines += breaks
    lines += [f"compiled again: {reason}" for reason in explanation.recompiles]
    lines += [f"matches nothing: {pattern}" for pattern in explanation.unused]
    return lines
