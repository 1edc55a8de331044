"""Progress on the terminal: one bar for each step that takes a while."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

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


class Update(Protocol):
    def __call__(self, done: int, total: int | None = None, /) -> None: ...


@contextlib.contextmanager
def step(
    console: Console,
    description: str,
    total: int | None = None,
    *,
    in_bytes: bool = False,
    counted: bool = False,
) -> Iterator[Update]:
    """A bar that is shown while the ``with`` block runs; yields a function of the amount done.

    Without ``total`` nobody can say how long it takes, and the bar only shows that it is alive, until
    the function is told; ``counted`` says that it will be.
    """
    columns: list[ProgressColumn] = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    ]
    if counted or total is not None:
        columns.insert(3, DownloadColumn() if in_bytes else MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)

        def update(done: int, total: int | None = None, /) -> None:
            progress.update(task, completed=done, total=total)

        yield update
        all_of_it = progress.tasks[task].total or 1
        progress.update(task, total=all_of_it, completed=all_of_it)
