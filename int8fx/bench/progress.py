"""Progress on the terminal: one bar for each step that takes a while."""

import contextlib
import importlib
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
    """What is shown while the ``with`` block runs; yields a function of the amount done.

    It is a bar with a count. Without ``total`` nobody can say how long it takes: it is no bar then, and
    shows that it is alive. ``counted`` says that the total will be told.
    """
    columns: list[ProgressColumn] = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
    ]
    if counted or total is not None:
        columns += [BarColumn(bar_width=20), DownloadColumn() if in_bytes else MofNCompleteColumn()]
    columns.append(TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)

        def update(done: int, total: int | None = None, /) -> None:
            progress.update(task, completed=done, total=total)

        yield update
        all_of_it = progress.tasks[task].total or 1
        progress.update(task, total=all_of_it, completed=all_of_it)


def import_libraries(console: Console) -> None:
    """Imports what takes seconds.

    Raises:
        ModuleNotFoundError: one is not installed.
    """
    names = ("torch", "transformers")
    with step(console, f"Importing {' and '.join(names)}", len(names)) as update:
        for done, name in enumerate(names, start=1):
            importlib.import_module(name)
            update(done)
