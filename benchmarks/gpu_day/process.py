"""One step, in its process: where it runs, its share of the work, its lines."""

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from gpu_day import lines
from gpu_day.place import Place, place
from gpu_day.steps import BY_NAME

SCRIPT = Path(__file__).parents[1] / "gpu.py"
ROOT = SCRIPT.parents[1]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Run:
    """What a step is given.

    Attributes:
        shard: its number and how many share the work; (0, 1), it is alone, and may start others.
        after: how many items of its share others have done.
    """

    step: str
    out: Path
    rehearses: bool
    shard: tuple[int, int] = (0, 1)
    after: int = 0

    @property
    def place(self) -> Place:
        return place(self.rehearses)

    def say(self, **found: Any) -> None:
        print(lines.text(self.step, **found), end="", flush=True)

    def share(self, items: Iterable[_Item]) -> Iterator[tuple[int, _Item]]:
        """This process's items, with their numbers within its share."""
        number, of = self.shard
        mine = islice(items, number, None, of)
        return ((place, item) for place, item in enumerate(mine) if place >= self.after)

    def command(self, step: str | None = None, *more: str) -> list[str]:
        """Of a process for this step, or another."""
        rehearses = ["--rehearse"] * self.rehearses
        name = step or self.step
        return [sys.executable, str(SCRIPT), "--step", name, "--out", str(self.out), *rehearses, *more]


def start(run: Run) -> None:
    """Runs one step in this process."""
    if run.rehearses:
        from gpu_day.rehearsal import rehearse

        rehearse()
    module, function = BY_NAME[run.step].function.split(":")
    getattr(importlib.import_module(f"gpu_day.{module}"), function)(run)


def in_shards(run: Run, count: int) -> bool:
    """Runs this step in ``count`` processes, which share its work; whether none found a fault.

    A process says ``{"begins": n}`` before item n of its share, which goes no further. One that dies is
    a fault, told with that line, and is started again behind that item.
    """
    faults: list[int] = []
    threads = [
        threading.Thread(target=_watch, args=(run, number, count, faults)) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not faults


def _watch(run: Run, number: int, count: int, faults: list[int]) -> None:
    after = 0
    while True:
        shard = ["--shard", f"{number}/{count}", "--after", str(after)]
        begun, output, code = _forwarded(run.command(None, *shard), faults)
        if code == 0:
            return
        faults.append(number)
        run.say(ok=False, died=begun, code=code, output=output[-600:])
        if begun is None:  # before its first item: it would again
            return
        after = begun["begins"] + 1


def _forwarded(command: Sequence[str], faults: list[int]) -> tuple[lines.Line | None, str, int]:
    """Passes a process's lines on: what it began last, its other output, its code."""
    begun, output = None, []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    for text in child.stdout:
        if not lines.is_line(text):
            output.append(text)
        elif "begins" in (line := json.loads(text)):
            begun = line
        else:
            print(text, end="", flush=True)
            if line.get("ok") is False:
                faults.append(0)
    return begun, "".join(output), child.wait()
