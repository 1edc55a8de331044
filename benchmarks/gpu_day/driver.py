"""Runs the steps of a part, each in a process of its own that is killed when its time is up.

A CUDA context does not survive a crash, so a crash ends its own step alone.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_day import lines
from gpu_day.process import ROOT, Run
from gpu_day.steps import STEPS, Step

# Of a rehearsal, whose processes share the cores of a busy machine.
PATIENCE = 8


@dataclass(frozen=True)
class Driver:
    """Where results go, and which are there.

    Attributes:
        out: a folder; results.jsonl and log.txt are added to.
        resumed: results of before: a step that is done there is left out.
    """

    out: Path
    rehearses: bool = False
    resumed: Path | None = None

    def run(self, parts: Sequence[str], steps: Sequence[Step] = STEPS) -> None:
        """Runs the steps of some parts that are not done."""
        self.out.mkdir(parents=True, exist_ok=True)
        done = lines.done(self.lines())
        results, log = self.out / lines.FILE, self.out / "log.txt"
        with open(results, "a", buffering=1) as to, open(log, "a", buffering=1) as also:
            for step in steps:
                if set(step.part) & set(parts) and step.name not in done:
                    self._step(step, to, also)

    def lines(self) -> list[lines.Line]:
        """What has been found, in this run and before."""
        before = [] if self.resumed is None else lines.read(self.resumed)
        return before + (lines.read(self.out) if (self.out / lines.FILE).exists() else [])

    def command(self, step: Step) -> list[str]:
        return Run(step.name, self.out, self.rehearses).command()

    def _step(self, step: Step, results: Any, log: Any) -> None:
        began = time.monotonic()
        child = subprocess.Popen(
            self.command(step), cwd=ROOT, env=_environment(self.rehearses),
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        late = threading.Event()
        seconds = step.seconds * (PATIENCE if self.rehearses else 1)
        timer = threading.Timer(seconds, _kill, (child, late))
        timer.start()
        assert child.stdout is not None
        for text in child.stdout:
            (results if lines.is_line(text) else log).write(text)
        code = child.wait()
        timer.cancel()
        _kill(child, threading.Event())  # what it has started and not ended
        ended = "timed out" if late.is_set() else "done" if code == 0 else "failed"
        seconds = round(time.monotonic() - began, 1)
        results.write(lines.text(step.name, ended=ended, code=code, seconds=seconds))
        print(f"{step.name}: {ended} after {seconds} s", file=sys.stderr, flush=True)


def _kill(child: subprocess.Popen, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _environment(rehearses: bool) -> dict[str, str]:
    """Caches that all steps share, and this checkout before any other."""
    cache = Path(tempfile.gettempdir()) / "gpu-day"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    environment.pop("TRITON_INTERPRET", None)  # torch cannot trace a triton_op with it
    return environment | ({"OMP_NUM_THREADS": "1"} if rehearses else {})
