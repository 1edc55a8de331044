"""The pictures of an ``Explanation``: outliers, SQNR, memory, threshold sensitivity.

matplotlib is imported inside ``draw``, and without its global state (pyplot): nothing of the user's
own figures or backend is touched.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from int8fx.errors import UserError
from int8fx.explanation import Explanation, Row, kind, mib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 4  # heat maps in a line
BINS = 192  # channels of one heat map: more are pooled by their maximum, so that none is lost
WIDTH, HEIGHT = 11.0, 3.1  # inches, of a line of panels
# The colours of |x| / threshold, from 1/16 to 16: what is an outlier is warm.
OCTAVES = 4


def draw(explanation: Explanation) -> "Figure":
    """The figure.

    Raises:
        UserError: matplotlib is not installed, or nothing was quantised.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            'drawing needs matplotlib: install with  python -m pip install "int8fx[plot]"'
        ) from error
    inputs = distinct_inputs(explanation.rows)
    if not inputs:
        raise UserError("there is nothing to draw: no linear was quantised and run")
    lines = math.ceil(len(inputs) / PANELS)
    figure = Figure(figsize=(WIDTH, HEIGHT * (lines + 1)), dpi=100, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[lines, 1.2])
    top, bottom = parts
    _outliers(top, inputs, explanation.threshold, lines)
    sqnr, memory, sensitivity = bottom.subplots(1, 3, width_ratios=[1.3, 0.8, 1])
    _sqnr(sqnr, explanation.rows)
    _memory(memory, explanation)
    _sensitivity(sensitivity, explanation)
    handles, labels = sqnr.get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return figure


def distinct_inputs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The quantised rows by kind; kinds that read the same inputs (q/k/v) are one."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        if row.accepted and row.channel_absmax:
            by_kind.setdefault(kind(row.path), []).append(row)
    by_input: dict[tuple, tuple[list[str], list[Row]]] = {}
    for name, members in by_kind.items():
        same = tuple(row.channel_absmax for row in members)
        by_input.setdefault(same, ([], members))[0].append(name.rpartition(".")[2] or name)
    return {"/".join(names): members for names, members in by_input.values()}


def pooled(absmax: Sequence[float], bins: int = BINS) -> list[float]:
    """``[K]`` in at most ``bins`` bins, each the largest of its channels."""
    K = len(absmax)
    edges = [round(index * K / min(bins, K)) for index in range(min(bins, K) + 1)]
    return [max(absmax[start:end]) for start, end in itertools.pairwise(edges)]


def _outliers(figure: Any, inputs: dict[str, list[Row]], threshold: float, lines: int) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, Normalize

    cool, warm = colormaps["Blues"], colormaps["YlOrRd"]
    steps = [index / 127 for index in range(128)]
    colours = [cool(0.75 * step) for step in steps] + [warm(0.35 + 0.65 * step) for step in steps]
    # Without decomposition nothing is an outlier; 6 is where the paper looks for them.
    middle = threshold if 0 < threshold < math.inf else 6.0
    figure.suptitle(f"Largest |x| of each input channel, by layer (warm: outliers, >= {middle:g})")
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
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("channel", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(inputs) :]:
        axis.set_visible(False)
    axes[0][0].set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.01)
    ticks = range(-OCTAVES, OCTAVES + 1, 2)
    bar.set_ticks(list(ticks), labels=[f"{middle * 2.0**tick:.3g}" for tick in ticks], fontsize=8)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.sqnr_db is not None and math.isfinite(row.sqnr_db):
            lines.setdefault(kind(row.path), []).append(row)
    return lines


def _sqnr(axes: "Axes", rows: Sequence[Row]) -> None:
    for name, members in _lines(rows).items():
        values = [row.sqnr_db for row in members if row.sqnr_db is not None]
        axes.plot(range(len(values)), values, marker="o", ms=2.5, lw=1, label=_last(name))
    axes.set_title("SQNR of the output, by layer", fontsize=10)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("dB", fontsize=8)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _memory(axes: "Axes", explanation: Explanation) -> None:
    totals = explanation.totals
    rest = max(totals.model_bytes - totals.float_bytes - totals.left_bytes, 0)
    parts = {
        "quantised linears": (totals.float_bytes, totals.kept_bytes),
        "linears in float": (totals.left_bytes, totals.left_bytes),
        "the rest": (rest, rest),
    }
    bottoms = [0.0, 0.0]
    for name, values in parts.items():
        heights = [value / 2**20 for value in values]
        if any(heights):
            axes.bar(["before", "after"], heights, bottom=bottoms, label=name, width=0.6)
            bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]
    for index, height in enumerate(bottoms):
        axes.annotate(mib(round(height * 2**20)), (index, height), ha="center", va="bottom", fontsize=8)
    axes.margins(y=0.35)
    axes.set_title("Weights, MiB", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="upper right")


def _sensitivity(axes: "Axes", explanation: Explanation) -> None:
    axes.set_title("Median SQNR, by threshold", fontsize=10)
    lines = {name: [row.sqnr_db_at for row in rows] for name, rows in _lines(explanation.rows).items()}
    lines = {name: rows for name, rows in lines.items() if rows[0]}
    if not lines:
        axes.text(0.5, 0.5, "no scheme here has a threshold", ha="center", fontsize=8)
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
    axes.set_xlabel("threshold (dotted: chosen)", fontsize=8)
    axes.set_ylabel("dB", fontsize=8)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _last(name: str) -> str:
    return name.rpartition(".")[2] or name
