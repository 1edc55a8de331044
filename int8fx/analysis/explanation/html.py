"""An ``Explanation`` as HTML: a fragment for notebooks, and one page that needs no other file."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from int8fx.analysis.explanation.record import (
    Findings,
    Row,
    by_kind,
    memory,
    outliers,
    pass_rows,
    sqnr,
)
from int8fx.analysis.explanation.text import sentences

STYLE = """
.int8fx { font: 13px/1.4 system-ui, sans-serif; color: #1a1a1a; background: #fff }
.int8fx table { border-collapse: collapse; margin: 1em 0 }
.int8fx th, .int8fx td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #e4e4e4 }
.int8fx th { position: sticky; top: 0; background: #f4f4f4 }
.int8fx td:first-child, .int8fx th:first-child { text-align: left; font-family: monospace }
.int8fx td:last-child { text-align: left; color: #777 }
.int8fx tr.float td { color: #999 }
.int8fx img { max-width: 100% }
"""
HEADINGS = (
    *("module", "N x K", "scheme", "calls", "rows", "outliers", "max |x|", "SQNR dB", "MiB"),
    *("FLOPs", "reason"),
)


def fragment(explanation: Findings) -> str:
    """The summary and the tables, to be put into another page."""
    summary = "".join(f"<li>{html.escape(line)}</li>" for line in sentences(explanation))
    kinds = by_kind(explanation.rows).items()
    groups = ((name, scheme, str(len(members))) for (name, scheme), members in kinds)
    passes = pass_rows(explanation.passes)
    return (
        f'<div class="int8fx"><style>{STYLE}</style><ul>{summary}</ul>'
        f"{_table(('modules', 'scheme', 'count'), ((each, '') for each in groups))}"
        f"{_table(HEADINGS, map(_row, explanation.rows))}"
        f"{_table(('pass', 'changed', 'left'), ((each, '') for each in passes))}</div>"
    )


def page(explanation: Findings) -> str:
    """A whole page, with the pictures in it.

    Raises:
        UserError: the pictures cannot be drawn, see ``explanation_plots.draw``.
    """
    from int8fx.analysis.explanation.plots import draw

    picture = io.BytesIO()
    draw(explanation).savefig(picture, format="png")
    source = base64.b64encode(picture.getvalue()).decode()
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>int8fx</title></head><body>'
        f'<div class="int8fx"><h1>What int8fx does to this model</h1>'
        f'<img alt="outliers, SQNR, memory and thresholds" src="data:image/png;base64,{source}"></div>'
        f"{fragment(explanation)}</body></html>"
    )


def _row(row: Row) -> tuple[Sequence[str], str]:
    cells = (
        row.path,
        "" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}",
        row.scheme or "float",
        str(row.calls),
        str(row.rows or ""),
        outliers(row),
        "" if row.input_absmax is None else f"{row.input_absmax:.2f}",
        sqnr(row.sqnr_db),
        memory(row.float_bytes, row.kept_bytes) if row.float_bytes else "",
        f"{row.share:.2%}",
        row.reason,
    )
    return cells, "" if row.accepted else "float"


def _table(headings: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        f'<tr class="{style}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells, style in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
