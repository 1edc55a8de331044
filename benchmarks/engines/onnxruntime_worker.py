"""ONNX Runtime GenAI: ``onnxruntime_worker.py FOLDER CAPACITY``."""

import json
import sys

import numpy
import onnxruntime_genai as genai
from worker import THREADS, serve


class OnnxRuntime:
    def __init__(self, folder: str, capacity: int) -> None:
        config = genai.Config(folder)
        session = {"intra_op_num_threads": THREADS}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)
        self._capacity = capacity

    def _generator(self):
        how = genai.GeneratorParams(self._model)
        how.set_search_options(do_sample=False, max_length=self._capacity, min_length=self._capacity)
        return genai.Generator(self._model, how)

    def prefill(self, tokens):
        self._running = self._generator()
        self._running.append_tokens(numpy.array([tokens], numpy.int32))
        return self.decode(1)

    def decode(self, steps):
        for _ in range(steps):
            self._running.generate_next_token()
        return int(self._running.get_next_tokens()[0])

    def logits(self, tokens):
        generator = self._generator()
        generator.append_tokens(numpy.array([tokens], numpy.int32))
        return generator.get_output("logits")[0]


serve(OnnxRuntime(sys.argv[1], int(sys.argv[2])))
