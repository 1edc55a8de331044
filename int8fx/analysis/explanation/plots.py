"""The pictures of an ``Explanation``: outliers, SQNR, memory, threshold sensitivity.

matplotlib is imported inside ``draw``, and without its global state (pyplot): nothing of the user's
own figures or backend is touched.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from int8fx.analysis.explanation.record import Findings, Row, kind, mib
from int8fx.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 2  # heat maps in a line
BINS = 192  # channels of one heat map: more are pooled by their maximum, so that none is lost
# Inches of a line of panels. A page shows it 800 pixels wide, 100 an inch, at which 9 points are read
# with ease; it is drawn with twice as many for screens that have them.
WIDTH, HEIGHT, DPI = 8.0, 2.3, 200
TITLE, LABEL = 10, 9  # points
UNSEEN = 0.005  # of all bytes: a part this small has no place in a bar
# The colours of |x| / threshold, from 1/16 to 16: what is an outlier is warm.
OCTAVES = 4


def require_matplotlib() -> None:
    """Raises:
    UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            'drawing needs matplotlib: install with  python -m pip install "int8fx[plot]"'
        ) from error


def draw(explanation: Findings) -> "Figure":
    """The figure.

    Raises:
        UserError: matplotlib is not installed, or nothing was quantised.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    inputs = distinct_inputs(explanation.rows)
    if not inputs:
        raise UserError("there is nothing to draw: no linear was quantised and run")
    lines = math.ceil(len(inputs) / PANELS)
    figure = Figure(figsize=(WIDTH, HEIGHT * (lines + 2.4)), dpi=DPI, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[lines, 2.4], hspace=0.04)
    top, bottom = parts
    _outliers(top, inputs, explanation.threshold, lines)
    panels: Any = bottom.subplot_mosaic(
        [["sqnr", "sqnr"], ["memory", "sensitivity"]], width_ratios=[1, 2]
    )
    _sqnr(panels["sqnr"], explanation.rows)
    _memory(panels["memory"], explanation)
    _sensitivity(panels["sensitivity"], explanation)
    handles, labels = panels["sqnr"].get_legend_handles_labels()
    columns = min(len(labels), 8)
    bottom.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=LABEL, frameon=False
    )
    return figure


def distinct_inputs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The quantised rows by kind; kinds that read the same inputs (q/k/v) are one.

    Layers of a ``Sequential`` are of one kind, and may have inputs of several widths, a line each.
    """
    by_kind: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row.accepted and row.channel_absmax:
            widths = by_kind.setdefault(kind(row.path), {})
            widths.setdefault(len(row.channel_absmax), []).append(row)
    by_input: dict[tuple, tuple[list[str], list[Row]]] = {}
    for name, widths in by_kind.items():
        for K, members in widths.items():
            same = tuple(row.channel_absmax for row in members)
            shown = _last(name) if len(widths) == 1 else f"{_last(name)} K={K}"
            by_input.setdefault(same, ([], members))[0].append(shown)
    return {"/".join(names): members for names, members in by_input.values()}


def pooled(absmax: Sequence[float], bins: int = BINS) -> list[float]:
    """``[K]`` in at most ``bins`` bins, each the largest of its channels."""
    K = len(absmax)
    edges = [round(index * K / min(bins, K)) for index in range(min(bins, K) + 1)]
    return [max(absmax[start:end]) for start, end in itertools.pairwise(edges)]


def _outliers(figure: Any, inputs: dict[str, list[Row]], threshold: float, lines: int) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    cool, warm = colormaps["Blues"], colormaps["YlOrRd"]
    steps = [index / 127 for index in range(128)]
    colours = [cool(0.75 * step) for step in steps] + [warm(0.35 + 0.65 * step) for step in steps]
    # Without decomposition nothing is an outlier; 6 is where the paper looks for them.
    middle = threshold if 0 < threshold < math.inf else 6.0
    figure.suptitle(
        f"Largest |x| of each input channel, by layer (warm: outliers, ≥ {middle:g})", fontsize=TITLE
    )
    axes = figure.subplots(lines, min(PANELS, len(inputs)), squeeze=False)
    image = None
    for (name, members), axis in zip(inputs.items(), axes.flat, strict=False):
        magnitudes = [
            [math.log2(max(value, 1e-9) / middle) for value in pooled(row.channel_absmax)]
            for row in members
        ]
        image = axis.imshow(
            magnitudes,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(colours),
            norm=Normalize(-OCTAVES, OCTAVES),
            extent=(0, len(members[0].channel_absmax), len(members) - 0.5, -0.5),
        )
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(name, fontsize=LABEL)
        axis.set_xlabel("channel", fontsize=LABEL)
        axis.tick_params(labelsize=LABEL)
    for axis in list(axes.flat)[len(inputs) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("layer", fontsize=LABEL)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.01)
    ticks = range(-OCTAVES, OCTAVES + 1, 2)
    bar.set_ticks(list(ticks), labels=[f"{middle * 2.0**tick:.3g}" for tick in ticks], fontsize=LABEL)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.sqnr_db is not None and math.isfinite(row.sqnr_db):
            lines.setdefault(kind(row.path), []).append(row)
    return lines


def _sqnr(axes: "Axes", rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, members in _lines(rows).items():
        values = [row.sqnr_db for row in members if row.sqnr_db is not None]
        axes.plot(range(len(values)), values, marker="o", ms=2.5, lw=1, label=_last(name))
    axes.set_title("SQNR of the output, by layer", fontsize=TITLE)
    axes.set_xlabel("layer", fontsize=LABEL)
    axes.set_ylabel("dB", fontsize=LABEL)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=LABEL)


def _memory(axes: "Axes", explanation: Findings) -> None:
    totals = explanation.totals
    rest = max(totals.model_bytes - totals.float_bytes - totals.left_bytes, 0)
    # Greys: the colours are those of the lines beside it, a linear each.
    parts = {
        "quantised linears": ("0.35", (totals.float_bytes, totals.kept_bytes)),
        "linears in float": ("0.65", (totals.left_bytes, totals.left_bytes)),
        "the rest": ("0.85", (rest, rest)),
    }
    bottoms = [0.0, 0.0]
    for name, (grey, values) in parts.items():
        heights = [value / 2**20 for value in values]
        if heights[0] >= totals.model_bytes / 2**20 * UNSEEN:
            axes.bar(["before", "after"], heights, bottom=bottoms, label=name, width=0.6, color=grey)
        bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]
    for index, height in enumerate(bottoms):
        label = mib(round(height * 2**20))
        axes.annotate(label, (index, height), ha="center", va="bottom", fontsize=LABEL)
    axes.margins(y=0.55)
    axes.set_title("Weights, MiB", fontsize=TITLE)
    axes.tick_params(labelsize=LABEL)
    axes.legend(fontsize=LABEL, loc="upper right", frameon=False, borderaxespad=0.1, handlelength=1)


def _sensitivity(axes: "Axes", explanation: Findings) -> None:
    axes.set_title("Median SQNR, by threshold", fontsize=TITLE)
    lines = {name: [row.sqnr_db_at for row in rows] for name, rows in _lines(explanation.rows).items()}
    lines = {name: rows for name, rows in lines.items() if rows[0]}
    if not lines:
        axes.text(0.5, 0.5, "no scheme here has a threshold", ha="center", fontsize=LABEL)
        return
    # 0, no decomposition, is what the largest thresholds tend to: it goes last.
    thresholds = sorted(next(iter(lines.values()))[0], key=lambda each: each or math.inf)
    for name, rows in lines.items():
        medians = [statistics.median(row[each] for row in rows) for each in thresholds]
        axes.plot(range(len(thresholds)), medians, marker="o", ms=2.5, lw=1, label=_last(name))
    if explanation.threshold in thresholds:
        axes.axvline(thresholds.index(explanation.threshold), color="grey", lw=1, ls=":")
    labels = [f"{each:g}" if each else "none" for each in thresholds]
    axes.set_xticks(range(len(thresholds)), labels=labels)
    axes.set_xlabel("threshold (dotted: chosen)", fontsize=LABEL)
    axes.set_ylabel("dB", fontsize=LABEL)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=LABEL)


def _last(name: str) -> str:
    return name.rpartition(".")[2] or name
