"""What ``int8fx.explain`` found, for people and for programs."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 80


def as_text(shown: RenderableType) -> str:
    """What a terminal of 80 columns shows, without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class Row:
    """One linear or matmul of the model.

    Attributes:
        path: the module that owns the weight, or the FX node's name when there is no weight.
        spelling: what the model wrote.
        shape: ``(N, K)`` of the weight, or None.
        accepted, reason: whether it runs in int8, and why not.
        scheme: a name of ``int8fx.SCHEMES``, or empty.
        calls, rows: how often it ran, and on how many rows of its input in total.
        outlier_columns, outlier_elements: how many had ``|x| >= threshold`` on these inputs; None
            when the input was not seen, or the scheme knows no outliers.
        input_absmax: the largest ``|x|``, or None.
        sqnr_db: of its output against the float weight's on the same input; None when it stays in
            float or did not run, ``inf`` when they are equal.
        sqnr_db_at: the same at other thresholds, 0 being no decomposition.
        channel_absmax: the largest ``|x|`` of each input channel.
        float_bytes, kept_bytes: of its weight, before and after.
        counts_bytes: False when an earlier row has the same weight.
        flops: of all its calls, in the float model.
        share: of all FLOPs of the model's run, 0 to 1.
    """

    path: str
    spelling: str
    shape: tuple[int, int] | None
    accepted: bool
    reason: str
    scheme: str
    calls: int
    rows: int
    outlier_columns: int | None
    outlier_elements: int | None
    input_absmax: float | None
    sqnr_db: float | None
    sqnr_db_at: dict[float, float]
    channel_absmax: tuple[float, ...]
    float_bytes: int
    kept_bytes: int
    counts_bytes: bool
    flops: int
    share: float


@dataclass(frozen=True)
class Totals:
    """Sums over the rows; a weight that several share counts once.

    Attributes:
        candidates, accepted: linears and matmuls, and how many of them run in int8.
        float_bytes, kept_bytes: of the quantised weights, before and after.
        left_bytes: of the weights that stay in float.
        model_bytes: of all parameters and buffers of the model; 0 when it is no module.
        flops: of the run.
        accepted_share: of it, in quantised linears, 0 to 1.
    """

    candidates: int
    accepted: int
    float_bytes: int
    kept_bytes: int
    left_bytes: int
    model_bytes: int
    flops: int
    accepted_share: float


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo broke a graph off, and at which line."""

    reason: str
    where: str


@dataclass(frozen=True)
class Explanation:
    """What the backend makes of a model, on the inputs of one run.

    ``print`` shows it as a table; in a notebook it shows itself.

    Attributes:
        rows: one for each linear and matmul, in the order in which they run.
        totals: sums over them.
        threshold: of the outliers counted.
        kernel: what computes the int8 linears, by device type.
        unused: patterns of ``skip``, ``only`` and ``rules`` that decide on nothing.
        graphs: how many Dynamo made.
        graph_breaks, recompiles: why it made more than one.
    """

    rows: tuple[Row, ...]
    totals: Totals
    threshold: float
    kernel: dict[str, str]
    unused: tuple[str, ...]
    graphs: int
    graph_breaks: tuple[GraphBreak, ...]
    recompiles: tuple[str, ...]

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        # The summary last: it is what a terminal shows when everything has scrolled by.
        return Group(_row_table(self), "", _kind_table(self.rows), "", *map(Text, sentences(self)))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it: an infinite SQNR is None with ``exact: true``."""
        values = asdict(self)
        for row in values["rows"]:
            row["exact"] = row["sqnr_db"] == math.inf
            row["sqnr_db"] = _finite(row["sqnr_db"])
            at = row["sqnr_db_at"]
            row["sqnr_db_at"] = {f"{key:g}": _finite(value) for key, value in at.items()}
        return values

    def to_html(self, path: str | Path) -> None:
        """Writes one page that needs no other file, with the tables and the pictures.

        Raises:
            UserError: matplotlib is not installed.
        """
        from int8fx.explanation_page import page

        Path(path).write_text(page(self), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draws outliers, SQNR, memory and threshold sensitivity; the suffix chooses the format.

        Raises:
            UserError: matplotlib is not installed.
        """
        from int8fx.explanation_plots import draw

        draw(self).savefig(path)

    def _repr_html_(self) -> str:
        from int8fx.explanation_page import fragment

        return fragment(self)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def kind(path: str) -> str:
    """A module path without its numbers: ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); ``inf`` when there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


# --- as text -------------------------------------------------------------------------------------


def _row_table(explanation: Explanation) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("module", overflow="fold")
    for column in ("N x K", "scheme", "outliers", "SQNR", "MiB", "FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in explanation.rows:
        name: RenderableType = Text(row.path)
        if row.reason:
            name = Group(name, Padding(Text(row.reason, style="dim"), (0, 0, 0, 2)))
        table.add_row(name, *_cells(row))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    return (
        "" if row.shape is None else f"{row.shape[0]}x{row.shape[1]}",
        row.scheme or "float",
        outliers(row),
        sqnr(row.sqnr_db),
        memory(row.float_bytes, row.kept_bytes) if row.float_bytes else "",
        f"{row.share:.1%}",
    )


def outliers(row: Row) -> str:
    """Columns and elements, as ``3/129``."""
    if row.outlier_columns is None or row.outlier_elements is None:
        return ""
    return f"{row.outlier_columns}/{row.outlier_elements}"


def sqnr(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def memory(before: int, after: int) -> str:
    if before == after:
        return f"{before / 2**20:.1f}"
    return f"{before / 2**20:.1f}>{after / 2**20:.1f}"


def by_kind(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that differ in their layer's number only, together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((kind(row.path), row.scheme or "float"), []).append(row)
    return groups


def _kind_table(rows: Sequence[Row]) -> Table:
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


def sentences(explanation: Explanation) -> list[str]:
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


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
