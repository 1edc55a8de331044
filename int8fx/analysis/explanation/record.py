"""What ``explain`` found, as data: a row for each linear, sums, graph breaks; and how cells read."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from int8fx.passes.outcome import Outcome


@dataclass(frozen=True)
class Row:
    """One linear or matmul of the model.

    Attributes:
        path: the module that owns the weight, or the FX node's name when there is no weight.
        spelling: what the model wrote.
        shape: ``(N, K)`` of the weight, or None.
        accepted, reason: whether it runs in int8, and why not.
        scheme: a name of ``int8fx.SCHEMES``, or empty.
        note: how its product is computed, where no kernel does; else empty.
        calls, rows: how often it ran, and on how many rows of its input in total.
        outlier_columns, outlier_elements: how many had ``|x| >= threshold`` on these inputs; None
            when the input was not seen, or the scheme knows no outliers.
        input_absmax: the largest ``|x|``, or None.
        sqnr_db: of its output against the float weight's on the same input; None when it stays in
            float or did not run, ``inf`` when they are equal.
        sqnr_db_at: the same at other thresholds, 0 being no decomposition.
        static_columns: the columns of its input that its scheme keeps in 16-bit for every row.
        sqnr_db_unrotated: the same in int8 without the rotation that its scheme has, else None.
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
    note: str
    calls: int
    rows: int
    outlier_columns: int | None
    outlier_elements: int | None
    input_absmax: float | None
    sqnr_db: float | None
    sqnr_db_at: dict[float, float]
    static_columns: tuple[int, ...]
    sqnr_db_unrotated: float | None
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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Findings:
    """What the backend makes of a model, on the inputs of one run.

    Attributes:
        rows: one for each linear and matmul, in the order in which they run.
        totals: sums over them.
        threshold: of the outliers counted.
        kernel: what computes the int8 linears, by device type.
        unused: patterns of ``skip``, ``only`` and ``rules`` that decide on nothing.
        passes: what each pass changes in the graphs, and why it leaves the rest.
        graphs: how many Dynamo made.
        graph_breaks, recompiles: why it made more than one.
        model: its name.
        options: as they were given.
        versions: of the packages that the result depends on.
        date: when it ran, with the time zone.
    """

    rows: tuple[Row, ...]
    totals: Totals
    threshold: float
    kernel: dict[str, str]
    unused: tuple[str, ...]
    passes: tuple[Outcome, ...]
    graphs: int
    graph_breaks: tuple[GraphBreak, ...]
    recompiles: tuple[str, ...]
    model: str
    options: str
    versions: dict[str, str]
    date: str


def kind(path: str) -> str:
    """A module path without its numbers: ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); ``inf`` when there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


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


def notes(row: Row) -> str:
    """What is said below the name of a linear: why it stays in float, or how it is computed."""
    if row.reason:
        return row.reason
    static = ", ".join(map(str, row.static_columns))
    unrotated = row.sqnr_db_unrotated
    said = (
        row.note,
        f"columns {static} in 16-bit" if static else "",
        "" if unrotated is None else f"{unrotated:.1f} dB without rotation",
    )
    return "; ".join(filter(None, said))


def cells(row: Row) -> dict[str, str]:
    """What is said of a linear, by column."""
    return {
        "N x K": "" if row.shape is None else f"{row.shape[0]}x{row.shape[1]}",
        "scheme": row.scheme or "float",
        "outliers": outliers(row),
        "SQNR": sqnr(row.sqnr_db),
        "MiB": memory(row.float_bytes, row.kept_bytes) if row.float_bytes else "",
        "FLOPs": f"{row.share:.1%}",
    }


def kind_cells(rows: Iterable[Row]) -> Iterator[dict[str, str]]:
    """What is said of each kind of linear, by column."""
    for (name, scheme), members in by_kind(rows).items():
        largest = [row.input_absmax for row in members if row.input_absmax is not None]
        noise = [row.sqnr_db for row in members if row.sqnr_db is not None]
        counted = [row for row in members if row.counts_bytes]
        before = sum(row.float_bytes for row in counted)
        yield {
            "modules": name,
            "count": str(len(members)),
            "scheme": scheme,
            "max |x|": f"{max(largest):.1f}" if largest else "",
            "min SQNR": sqnr(min(noise) if noise else None),
            "MiB": memory(before, sum(row.kept_bytes for row in counted)),
            "FLOPs": f"{sum(row.share for row in members):.1%}",
        }


def by_kind(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that differ in their layer's number only, together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((kind(row.path), row.scheme or "float"), []).append(row)
    return groups


def pass_rows(passes: Iterable[Outcome]) -> list[tuple[str, str, str]]:
    """Cells of a table: the pass, how many places it changed, and why others stay, a line a reason."""
    rows = []
    for each in passes:
        if each.is_silent:
            continue
        left = [f"{count} left: {reason}" for reason, count in each.refused.items()]
        first, *rest = [f"not run: {each.skipped}"] if each.skipped else left or [""]
        rows.append((each.name, "" if each.skipped else str(each.changed), first))
        rows += [("", "", line) for line in rest]
    return rows


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
