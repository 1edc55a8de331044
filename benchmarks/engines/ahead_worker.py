"""A folder of ``int8fx compile``, without ``import torch``: ``ahead_worker.py FOLDER CAPACITY``.

Its cache keeps what a prompt has in common with the one before. So each prefill is behind a text of
another token, which is not timed.
"""

import dataclasses
import sys
import time

from worker import THREADS, serve

import int8fx_run  # noqa: F401  before int8fx, which imports torch without it
from int8fx.ahead.artefact import read
from int8fx.ahead.model import Model


class Ahead:
    def __init__(self, folder: str, capacity: int) -> None:
        # No token ends a text, so that there are as many steps as are asked for.
        self._model = Model(dataclasses.replace(read(folder), stop=()), THREADS)
        self._capacity = capacity

    def prefill(self, tokens):
        start = time.perf_counter()
        next(self._model.tokens([1 if tokens[0] == 0 else 0], max_new_tokens=1), None)
        self.not_counted = time.perf_counter() - start
        self._running = self._model.tokens(tokens, max_new_tokens=self._capacity - len(tokens))
        return next(self._running)

    def decode(self, steps):
        self.not_counted = 0.0
        for _ in range(steps):
            token = next(self._running)
        return token


serve(Ahead(sys.argv[1], int(sys.argv[2])))
