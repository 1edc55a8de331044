"""What a contender's process does: it loads a model, and runs what the driver asks, a line each.

A line of input is ``[method, *arguments]`` as JSON. The answer is one line, an object of ``seconds``,
``peak_bytes`` and ``answer``. Nothing of torch or int8fx is imported here: most engines have neither.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

THREADS = 2


class Engine(Protocol):
    """A model in one engine, with one KV cache.

    It may have ``not_counted``: seconds of its last call that are no part of what was asked.
    """

    def prefill(self, tokens: Sequence[int]) -> int:
        """Empties the cache and fills it with ``tokens``; the most likely next one."""

    def decode(self, steps: int) -> int:
        """So many tokens more, each the most likely one; the last."""

    def logits(self, tokens: Sequence[int]) -> Any:
        """``[n, V]`` in fp32, as numpy has it, from an empty cache."""


def peak_bytes() -> int:
    """The largest resident size of this process; getrusage counts what it was forked from, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def save_logits(engine: Engine, tokens: Sequence[int], path: str) -> None:
    import numpy

    numpy.save(path, numpy.asarray(engine.logits(tokens), numpy.float32))


def serve(engine: Engine) -> None:
    """Answers until the driver closes the pipe. What engines print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        start = time.perf_counter()
        if method == "logits":
            answer = save_logits(engine, *arguments)
        else:
            answer = getattr(engine, method)(*arguments)
        seconds = time.perf_counter() - start - getattr(engine, "not_counted", 0.0)
        print(
            json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "answer": answer}),
            file=answers,
            flush=True,
        )
