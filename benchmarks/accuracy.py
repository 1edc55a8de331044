"""Accuracy of llmint8's thresholds and decompositions on SmolLM2-135M-Instruct, compiled.

    python benchmarks/accuracy.py             # the model as it is
    python benchmarks/accuracy.py --inject    # and with six outlier features in every block
    python benchmarks/accuracy.py --attention # what QKᵀ and PV in int8 cost, where attention is eager
    python benchmarks/accuracy.py --rotated   # int8-rotated, bf16 and every other scheme

Prints perplexity, KL divergence and top-1 agreement with fp32 on the public-domain text that ships
with the package, through Inductor as a user runs it; ``--json`` writes them too. ``int8fx evaluate`` is
the same for any model, text and scheme.
"""

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import int8fx
from int8fx.analysis.evaluate import LogitsOf, Settings, contender, evaluate, logits_of
from int8fx.analysis.outlier_injection import inject_and_check
from int8fx.bench import smollm2
from int8fx.bench.texts import load_with_tokens
from int8fx.bench.timing import machine
from int8fx.options import OUTPUT_HEADS
from int8fx.torch_private import compile_counts

# Threshold 0 takes nothing out, so the decompositions are the same there.
SPECS = (
    "llm.int8,threshold=6,decomposition=column",
    "llm.int8,threshold=6,decomposition=token",
    "llm.int8,threshold=3,decomposition=column",
    "llm.int8,threshold=3,decomposition=token",
    "llm.int8,threshold=0",
)

# What the columns of a calibration are found on: not the text that is judged.
CALIBRATION_TEXT = """Green plants make sugar from carbon dioxide and water, with the energy of
sunlight; the oxygen that is left over goes into the air. In 1905 Albert Einstein published four papers,
one of them on light. For the dough you need 200 g of flour, two eggs and a pinch of salt. Bake it at
180 degrees.
def total(numbers): return sum(int(n) for n in numbers)  # of what was read"""

# Products of two activations beside the linears.
ATTENTION: Mapping[str, Mapping[str, Any]] = {
    "linears": {},
    "linears and attention": {"attention": True},
    "linears and attention, threshold 3": {"attention": True, "threshold": 3.0},
}


def rotated(model: Any) -> dict[str, dict[str, Any]]:
    """int8-rotated without data, and calibrated on another text with the head in float and in int8;
    then every other scheme."""
    _, tokenizer = smollm2.load(Console(stderr=True))
    token_ids = torch.tensor([tokenizer(CALIBRATION_TEXT)["input_ids"]])
    calibration = int8fx.calibrate(model, [{"input_ids": token_ids, "use_cache": False}])
    calibrated = {"scheme": "int8-rotated", "calibration": calibration}
    return {
        "int8-rotated": {"scheme": "int8-rotated"},
        "int8-rotated, 8 columns": {**calibrated, "skip": list(OUTPUT_HEADS)},
        "int8-rotated, 8 columns, head too": calibrated,
        **{name: {"scheme": name} for name in int8fx.SCHEMES if name != "int8-rotated"},
    }


def in_bf16(model: Any) -> dict[str, LogitsOf]:
    """A copy of the model through Inductor, with weights and activations in bf16."""
    return {"bf16": logits_of(torch.compile(copy.deepcopy(model).bfloat16(), dynamic=False))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens")
    parser.add_argument("--inject", action="store_true", help="outlier features into the norms")
    parser.add_argument("--factor", type=float, default=30.0, help="of the injection")
    parser.add_argument("--seed", type=int, default=0, help="of the injected channels")
    parser.add_argument("--attention", action="store_true", help="of attention in int8, instead")
    parser.add_argument("--rotated", action="store_true", help="int8-rotated and others, instead")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()

    progress = Console(stderr=True)
    model, token_ids = load_with_tokens(None, None, progress)
    if arguments.attention:
        # Fused attention has no products that a graph could show.
        model.set_attn_implementation("eager")
    factor = arguments.factor if arguments.inject else None
    if arguments.rotated and factor is not None:
        # Columns are found in the model that has the outlier features.
        channels = inject_and_check(model, factor, arguments.seed, logits_of(model), token_ids[:512])
        print(f"channels {channels} of every norm x{factor:g}")
        factor = None
    contenders: Mapping[str, Mapping[str, Any]] = {spec: contender(spec) for spec in SPECS}
    if arguments.attention:
        contenders = ATTENTION
    others: Mapping[str, LogitsOf] = {}
    if arguments.rotated:
        contenders, others = rotated(model), in_bf16(model)
    settings = Settings(
        contenders,
        windows=arguments.windows,
        factor=factor,
        seed=arguments.seed,
        compiled=True,
        others=others,
    )
    outcome = evaluate(model, token_ids, settings, smollm2.CONVERTED, progress)
    _, breaks = compile_counts()
    Console().print(outcome)
    print(f"graph breaks: {breaks}")
    if arguments.json:
        found = {"machine": machine(), "graph_breaks": breaks} | outcome.to_dict()
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if breaks:
        raise SystemExit(f"{breaks} graph breaks; none are allowed")


if __name__ == "__main__":
    main()
