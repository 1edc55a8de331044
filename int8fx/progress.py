"""Progress on the terminal: one bar for each step that takes a while."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


@contextlib.contextmanager
def step(
    console: Console, description: str, total: int | None = None, *, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar that is shown while the ``with`` block runs; yields a function of the amount done.

    Without ``total`` nobody can say how long it takes, and the bar only shows that it is alive.
    """
    columns: list[ProgressColumn] = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    ]
    if total is not None:
        columns.insert(3, DownloadColumn() if in_bytes else MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)
        progress.update(task, total=total or 1, completed=total or 1)
