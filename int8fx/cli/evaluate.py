"""``int8fx evaluate --method``: copies of the model, each quantised by an algorithm."""

import copy
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from int8fx.analysis.evaluate import quantized
from int8fx.analysis.metrics import LogitsOf
from int8fx.bench.progress import step
from int8fx.cli.method import Chosen
from int8fx.weights.quantize import quantize_
from int8fx.weights.store import WeightStore


def by_algorithms(
    model: Any, tokenizer: Any, algorithms: Mapping[str, Chosen], compiled: bool, progress: Console
) -> dict[str, LogitsOf]:
    """The logits of a quantised copy of the model for each.

    Raises:
        UserError: the text of an algorithm is too short.
    """
    found, store = {}, WeightStore()
    for name, how in algorithms.items():
        made = copy.deepcopy(model)
        batches = how.batches(tokenizer, model.device)
        with step(progress, f"Quantising: {name}", counted=True) as update:
            quantize_(made, method=how.method, batches=batches, on_weight=update, **how.options)
        found[name] = quantized(made, {}, store, compiled)
    return found
