"""torch: int8fx, Inductor or eager, with a static KV cache: ``int8fx_worker.py FOLDER CAPACITY HOW``.

``HOW`` is JSON: ``dtype``, ``backend`` (none: eager), ``options``, and ``calibrate``, whether the
columns of int8-rotated are found on 64 tokens first.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM
from worker import THREADS, serve

from int8fx.bench.contenders import Contender


class Torch:
    def __init__(self, folder: str, capacity: int, how: dict) -> None:
        torch.set_num_threads(THREADS)
        dtype = getattr(torch, how["dtype"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        forward = model
        if "backend" in how:
            options = how.get("options", {})
            if how.get("calibrate"):
                options["calibration"] = calibrated(model)
            backend = how["backend"]
            forward = torch.compile(model, backend=backend, dynamic=False, options=options or None)
        self._contender = Contender("", "", model, forward, capacity)

    def prefill(self, tokens):
        self._token = self._contender.prefill(torch.tensor([tokens]))
        return int(self._token)

    def decode(self, steps):
        for _ in range(steps):
            self._token = self._contender.decode(self._token)
        return int(self._token)

    def logits(self, tokens):
        return self._contender.logits(torch.tensor([tokens]))[0].float().numpy()


def calibrated(model):
    import int8fx

    tokens = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    return int8fx.calibrate(model, [{"input_ids": tokens}])


serve(Torch(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))
