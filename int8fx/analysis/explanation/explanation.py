"""What ``int8fx.explain`` found, for people and for programs."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from int8fx.analysis.explanation.html import fragment, page
from int8fx.analysis.explanation.plots import draw
from int8fx.analysis.explanation.record import Findings, _finite
from int8fx.analysis.explanation.text import (
    as_text,
    kind_table,
    legend,
    pass_table,
    row_table,
    sentences,
)


class Explanation(Findings):
    """What the backend makes of a model, on the inputs of one run.

    ``print`` shows it as a table; in a notebook it shows itself.

    Attributes:
        rows: one for each linear and matmul, in the order in which they run.
        totals: sums over them.
        summary: what ``print`` shows before the rows.

    Examples:
        >>> import int8fx, torch
        >>> shown = int8fx.explain(torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.ones(4, 64))
        >>> shown
        <Explanation of a Sequential: 1 of 1 linears and matmuls quantised>
        >>> shown.totals.float_bytes, shown.rows[0].scheme
        (8192, 'llm.int8')
    """

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        totals = self.totals
        return (
            f"<Explanation of a {self.model}: {totals.accepted} of {totals.candidates} linears and "
            "matmuls quantised>"
        )

    @property
    def summary(self) -> RenderableType:
        """Totals, a line for each kind of linear, and the passes: for rich, without the rows."""
        tables = [kind_table(self.rows)]
        tables += [pass_table(self.passes)] if self.passes else []
        spaced = (shown for table in tables for shown in (table, ""))
        return Group(*map(Text, sentences(self)), "", *spaced)

    def __rich__(self) -> RenderableType:
        return Group(self.summary, Text(legend(self)), row_table(self))

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
        Path(path).write_text(page(self), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draws outliers, SQNR, memory and threshold sensitivity; the suffix chooses the format.

        Raises:
            UserError: matplotlib is not installed.
        """
        draw(self).savefig(path)

    def _repr_html_(self) -> str:
        return fragment(self)
