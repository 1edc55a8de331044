"""An ``Explanation`` as HTML: a fragment for notebooks, and one page that needs no other file.

The tables have the columns of the terminal's. In the page a click on a heading sorts by its column.
Colours are the browser's own, so that both are read on a light screen and on a dark one.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from int8fx.analysis.explanation.record import (
    Findings,
    Row,
    cells,
    kind_cells,
    notes,
    pass_rows,
)
from int8fx.analysis.explanation.text import legend, sentences

STYLE = """
.int8fx { font: 13px/18px system-ui, sans-serif }
.int8fx .scroll { overflow-x: auto; margin: 1em 0 }
.int8fx table { border-collapse: separate; border-spacing: 0 }
.int8fx th, .int8fx td { padding: 2px .7em; text-align: right; white-space: nowrap;
  border-bottom: 1px solid rgba(127, 127, 127, .3) }
.int8fx td:first-child, .int8fx th:first-child { text-align: left }
.int8fx td:first-child { font-family: monospace }
.int8fx .note { text-align: left; white-space: normal; min-width: 14em; opacity: .7 }
.int8fx tr.float { opacity: .7 }
"""
PAGE_STYLE = """
:root { color-scheme: light dark }
body { margin: 1em; max-width: 75em }
h1 { font: 600 20px/1.3 system-ui, sans-serif; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em }
dd { margin: 0; overflow-wrap: anywhere }
.int8fx img { display: block; max-width: 100% }
.int8fx td:first-child, .int8fx th:first-child { position: sticky; left: 0; background: Canvas }
.int8fx th { cursor: pointer; user-select: none }
.int8fx th[aria-sort=ascending]::after { content: " \\2191" }
.int8fx th[aria-sort=descending]::after { content: " \\2193" }
@media (max-width: 600px) {
  .int8fx th, .int8fx td { padding: 2px .4em }
  .int8fx td:first-child { white-space: normal; min-width: 17ch }
  .int8fx img { max-width: none; width: 48em }
}
@media (prefers-color-scheme: dark) { .int8fx img { filter: invert(1) hue-rotate(180deg) } }
"""
# Numbers sort by the one that a cell begins with, largest first; other cells as text.
SCRIPT = """
for (const heading of document.querySelectorAll("th")) {
  heading.tabIndex = 0;
  heading.onkeydown = event => { if (event.key == "Enter") heading.click(); };
  heading.onclick = () => {
    const others = [...heading.parentNode.children], column = others.indexOf(heading);
    const body = heading.closest("table").tBodies[0], rows = [...body.rows];
    const text = row => row.cells[column].textContent;
    const number = row => parseFloat(text(row).replaceAll(",", ""));
    const numeric = column > 0 && rows.every(row => text(row) == "" || !isNaN(number(row)));
    const now = heading.getAttribute("aria-sort");
    const up = numeric ? now == "descending" : now != "ascending";
    const value = row => isNaN(number(row)) ? -Infinity : number(row);
    rows.sort((a, b) => (up ? 1 : -1) * (numeric
      ? value(a) - value(b) || 0 : text(a).localeCompare(text(b), "en", {numeric: true})));
    others.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  };
}
"""
SENTENCES = ("reason", "left")  # what columns of words are headed
PATHS = ("module", "modules", "pass")
TITLE = "What int8fx does to {}"


def fragment(explanation: Findings) -> str:
    """The summary and the tables, to be put into another page."""
    summary = "".join(f"<li>{html.escape(line)}</li>" for line in sentences(explanation))
    kinds = list(kind_cells(explanation.rows))
    headings = ("pass", "changed", "left")
    passes = [(list(zip(headings, row, strict=True)), "") for row in pass_rows(explanation.passes)]
    rows = [(_row(row), "" if row.accepted else "float") for row in explanation.rows]
    return (
        f'<div class="int8fx"><style>{STYLE}</style><ul>{summary}</ul>'
        f"{_table([(list(each.items()), '') for each in kinds])}"
        f"<p>{html.escape(legend(explanation))}; rows: of the input, in all calls</p>{_table(rows)}"
        f"{_table(passes)}</div>"
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
    title = html.escape(TITLE.format(explanation.model))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{PAGE_STYLE}</style></head><body>"
        f'<div class="int8fx"><h1>{title}</h1>{_facts(explanation)}</div>{fragment(explanation)}'
        '<div class="int8fx"><div class="scroll"><img alt="outliers, SQNR, memory and thresholds" '
        f'src="data:image/png;base64,{source}"></div></div><script>{SCRIPT}</script></body></html>'
    )


def _facts(explanation: Findings) -> str:
    """What was run, when, and on what."""
    versions = ", ".join(f"{name} {version}" for name, version in explanation.versions.items())
    facts: Mapping[str, str] = {
        "model": explanation.model,
        "options": explanation.options,
        "date": explanation.date,
        "versions": versions,
    }
    items = (f"<dt>{name}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _row(row: Row) -> list[tuple[str, str]]:
    shown = cells(row)
    return [
        ("module", row.path),
        ("N x K", shown.pop("N x K").replace("x", " x ")),
        *((heading.replace("SQNR", "SQNR dB"), cell) for heading, cell in shown.items()),
        ("calls", str(row.calls)),
        ("rows", str(row.rows or "")),
        ("max |x|", "" if row.input_absmax is None else f"{row.input_absmax:.2f}"),
        ("reason", notes(row)),
    ]


def _cell(tag: str, heading: str, text: str) -> str:
    style = ' class="note"' if heading in SENTENCES else ""
    shown = html.escape(text)
    if heading in PATHS:
        shown = shown.replace(".", ".<wbr>")  # where a narrow screen breaks it
    return f"<{tag}{style}>{shown}</{tag}>"


def _table(rows: Sequence[tuple[Iterable[tuple[str, str]], str]]) -> str:
    """A table of rows, each its headings with their cells, and a class."""
    if not rows:
        return ""
    head = "".join(_cell("th", heading, heading) for heading, _ in rows[0][0])
    body = "".join(
        f'<tr class="{style}">{"".join(_cell("td", *each) for each in line)}</tr>'
        for line, style in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
