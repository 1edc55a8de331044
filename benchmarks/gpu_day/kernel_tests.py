"""Is it right? ``tests/test_gpu.py``, dealt out to processes without any plug-in of pytest's."""

import os
import sys
from typing import Any

from gpu_day import lines
from gpu_day.process import Run, in_shards

_OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:logging", "--tb=short", "-W", "ignore")

# Of pytest: all passed, some failed, there were none.
_COMPLETE = (0, 1, 5)


def kernel_tests(run: Run) -> None:
    """Each process collects all tests and runs its share of them."""
    if run.shard != (0, 1):
        import pytest

        code = int(pytest.main([*run.place.tests, *_OPTIONS], plugins=[Reporter(run)]))
        sys.exit(0 if code in _COMPLETE else code)
    sys.exit(not in_shards(run, run.place.processes))


class Reporter:
    """A plug-in that keeps a share of the tests, and says a line for each."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._to = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # pytest captures the other one
        self._numbers: dict[str, int] = {}

    def _say(self, **found: Any) -> None:
        self._to.write("\n" + lines.text(self._run.step, **found))  # behind pytest's dots
        self._to.flush()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        mine = list(self._run.share(items))
        items[:] = [item for _, item in mine]
        self._numbers = {item.nodeid: number for number, item in mine}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say(begins=self._numbers[nodeid], test=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        failed = report.outcome == "failed"
        told = {"ok": False, "error": report.longreprtext[-600:]} if failed else {}
        self._say(test=report.nodeid, outcome=report.outcome, **told)
        if failed and not self._is_alive():
            sys.exit("the GPU's context is lost: the rest runs in another process")

    def _is_alive(self) -> bool:
        import torch

        try:
            self._run.place.synchronize()
            torch.zeros(1, device=self._run.place.device)
        except RuntimeError:
            return False
        return True
