"""llama.cpp through llama-cpp-python: ``llama_cpp_worker.py model.gguf CAPACITY``."""

import sys

import numpy
from llama_cpp import Llama
from worker import THREADS, serve


class LlamaCpp:
    def __init__(self, path: str, capacity: int) -> None:
        self._how = {
            "model_path": path,
            "n_ctx": capacity,
            "n_batch": 512,
            "n_threads": THREADS,
            "n_threads_batch": THREADS,
            "flash_attn": True,
            "verbose": False,
        }
        self._model = Llama(**self._how)

    def prefill(self, tokens):
        self._model.reset()
        return self._next(tokens)

    def decode(self, steps):
        for _ in range(steps):
            token = self._next([self._token])
        return token

    def _next(self, tokens):
        self._model.eval(tokens)
        logits = self._model._ctx.get_logits_ith(-1)
        self._token = int(numpy.ctypeslib.as_array(logits, (self._model.n_vocab(),)).argmax())
        return self._token

    def logits(self, tokens):
        every = Llama(**self._how, logits_all=True)
        every.eval(tokens)
        return every.scores[: len(tokens)].copy()


serve(LlamaCpp(sys.argv[1], int(sys.argv[2])))
