"""Graphs as text, and the option ``dump_graphs``: each graph before and after each pass, as files.

    graph_0/01_lower.before.py    graph_0/01_lower.after.py    graph_0/04_join_linears.before.py    ...

A pass that changes nothing writes nothing. The numbers are places in ``passes/order.py``.
"""

import itertools
from pathlib import Path

from torch import fx


def readable(gm: fx.GraphModule) -> str:
    """A graph and the graphs inside of it as Python, with the shape and dtype of each value."""
    return gm.print_readable(print_output=False)


class GraphDump:
    """The files of one graph, in the first free ``graph_N`` of a folder.

    Raises:
        OSError: the folder cannot be made, or written to.
    """

    def __init__(self, folder: Path, gm: fx.GraphModule) -> None:
        self._folder = _new_folder(folder)
        self._gm = gm
        self._before = readable(gm)

    def passed(self, number: int, name: str) -> None:
        """A pass has run."""
        after = readable(self._gm)
        if after != self._before:
            for when, text in (("before", self._before), ("after", after)):
                path = self._folder / f"{number:02}_{name}.{when}.py"
                path.write_text(text + "\n", encoding="utf-8")
        self._before = after


def _new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        made = folder / f"graph_{number}"
        try:
            made.mkdir()
        except FileExistsError:  # of a graph before this one, or of another process
            continue
        return made
    raise AssertionError
