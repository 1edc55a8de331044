"""Findings as text for a terminal of 80 columns."""

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from int8fx.analysis.explanation.record import (
    Findings,
    Row,
    by_kind,
    memory,
    mib,
    outliers,
    pass_rows,
    sqnr,
)
from int8fx.passes.outcome import Outcome

WIDTH = 80


def as_text(shown: RenderableType) -> str:
    """What a terminal of 80 columns shows, without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def row_table(explanation: Findings) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("module", overflow="fold")
    for column in ("N x K", "scheme", "outliers", "SQNR", "MiB", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in explanation.rows:
        name: RenderableType = Text(row.path)
        if below := row.reason or "; ".join(filter(None, (row.note, *_rotation(row)))):
            name = Group(name, Padding(Text(below, style="dim"), (0, 0, 0, 2)))
        table.add_row(name, *_cells(row))
    return table


def _rotation(row: Row) -> Iterator[str]:
    """What a rotated linear keeps in 16-bit, and what the rotation gains."""
    if row.static_columns:
        yield f"columns {', '.join(map(str, row.static_columns))} in 16-bit"
    if row.sqnr_db_unrotated is not None:
        yield f"{row.sqnr_db_unrotated:.1f} dB without rotation"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        "" if row.shape is None else f"{row.shape[0]}x{row.shape[1]}",
        row.scheme or "float",
        outliers(row),
        sqnr(row.sqnr_db),
        memory(row.float_bytes, row.kept_bytes) if row.float_bytes else "",
        f"{row.share:.1%}",
    )


def kind_table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("modules", overflow="fold")
    for column in ("count", "scheme", "max |x|", "min SQNR", "MiB", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for (name, scheme), members in by_kind(rows).items():
        largest = [row.input_absmax for row in members if row.input_absmax is not None]
        noise = [row.sqnr_db for row in members if row.sqnr_db is not None]
        counted = [row for row in members if row.counts_bytes]
        table.add_row(
            escape(name),
            str(len(members)),
            scheme,
            f"{max(largest):.1f}" if largest else "",
            sqnr(min(noise) if noise else None),
            memory(sum(row.float_bytes for row in counted), sum(row.kept_bytes for row in counted)),
            f"{sum(row.share for row in members):.1%}",
        )
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
    lines.append(
        f"outliers (columns/elements): |x| >= {explanation.threshold:g}; SQNR: dB against float"
        if explanation.threshold
        else "no decomposition; SQNR: dB against float"
    )
    breaks = [f"graph break at {each.where}: {each.reason}" for each in explanation.graph_breaks]
    lines.append(
        f"{explanation.graphs} graph{'s' if explanation.graphs != 1 else ''}, "
        f"{len(breaks)} graph breaks, {len(explanation.recompiles)} recompiles"
    )
    lines += breaks
    lines += [f"compiled again: {reason}" for reason in explanation.recompiles]
    lines += [f"matches nothing: {pattern}" for pattern in explanation.unused]
    return lines
