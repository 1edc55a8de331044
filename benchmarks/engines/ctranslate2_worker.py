"""CTranslate2: ``ctranslate2_worker.py FOLDER CAPACITY``.

It has no call for a single step. A decode is a generation of ``steps`` tokens behind the prompt, less
a generation of one.
"""

import json
import sys
import time
from pathlib import Path

import ctranslate2
import numpy
from worker import THREADS, serve


class CTranslate2:
    def __init__(self, folder: str) -> None:
        self._model = ctranslate2.Generator(folder, compute_type="int8", intra_threads=THREADS)
        self._names = json.loads((Path(folder) / "vocabulary.json").read_text())

    def _generate(self, steps):
        result = self._model.generate_batch(
            [[self._names[token] for token in self._prompt]],
            max_length=steps,
            min_length=steps,
            include_prompt_in_result=False,
        )
        return result[0].sequences_ids[0][-1]

    def prefill(self, tokens):
        self._prompt = tokens
        self.not_counted = 0.0
        start = time.perf_counter()
        token = self._generate(1)
        self._seconds = time.perf_counter() - start
        return token

    def decode(self, steps):
        self.not_counted = self._seconds
        return self._generate(steps + 1)

    def logits(self, tokens):
        return numpy.array(self._model.forward_batch([tokens]))[0]


serve(CTranslate2(sys.argv[1]))
