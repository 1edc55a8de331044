"""OpenVINO: ``openvino_worker.py FOLDER CAPACITY``.

It is the model that its GenAI runs, with the KV cache inside. Its runtime is asked token by token:
``LLMPipeline`` gives neither logits nor single steps.
"""

import sys
from pathlib import Path

import numpy
import openvino
from worker import THREADS, serve


class OpenVino:
    def __init__(self, folder: str) -> None:
        core = openvino.Core()
        how = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        model = core.compile_model(Path(folder) / "openvino_model.xml", "CPU", how)
        self._request = model.create_infer_request()
        self._names = {name for port in model.inputs for name in port.names}

    def prefill(self, tokens):
        self._request.reset_state()
        self._length = 0
        return self._next(tokens)

    def decode(self, steps):
        for _ in range(steps):
            token = self._next([self._token])
        return token

    def _next(self, tokens):
        self._token = int(self._run(tokens)[0, -1].argmax())
        return self._token

    def _run(self, tokens):
        start, self._length = self._length, self._length + len(tokens)
        given = {
            "input_ids": numpy.array([tokens], numpy.int64),
            "attention_mask": numpy.ones((1, self._length), numpy.int64),
            "position_ids": numpy.arange(start, self._length, dtype=numpy.int64)[None],
            "beam_idx": numpy.zeros(1, numpy.int32),
        }
        return self._request.infer({k: v for k, v in given.items() if k in self._names})["logits"]

    def logits(self, tokens):
        self._request.reset_state()
        self._length = 0
        return self._run(tokens)[0]


serve(OpenVino(sys.argv[1]))
