"""Accuracy of llmint8's thresholds and decompositions on SmolLM2-135M-Instruct, compiled.

    python benchmarks/accuracy.py             # the model as it is
    python benchmarks/accuracy.py --inject    # and with six outlier features in every block
    python benchmarks/accuracy.py --attention # what QKᵀ and PV in int8 cost, where attention is eager

Prints perplexity, KL divergence and top-1 agreement with fp32 on the public-domain text that ships
with the package, through Inductor as a user runs it; ``--json`` writes them too. ``int8fx evaluate`` is
the same for any model, text and scheme.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from int8fx.analysis.evaluate import Settings, contender, evaluate
from int8fx.bench import smollm2
from int8fx.bench.texts import load_with_tokens
from int8fx.bench.timing import machine
from int8fx.torch_private import compile_counts

# Threshold 0 takes nothing out, so the decompositions are the same there.
SPECS = (
    "llm.int8,threshold=6,decomposition=column",
    "llm.int8,threshold=6,decomposition=token",
    "llm.int8,threshold=3,decomposition=column",
    "llm.int8,threshold=3,decomposition=token",
    "llm.int8,threshold=0",
)

# Products of two activations beside the linears.
ATTENTION: Mapping[str, Mapping[str, Any]] = {
    "linears": {},
    "linears and attention": {"attention": True},
    "linears and attention, threshold 3": {"attention": True, "threshold": 3.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens")
    parser.add_argument("--inject", action="store_true", help="outlier features into the norms")
    parser.add_argument("--factor", type=float, default=30.0, help="of the injection")
    parser.add_argument("--seed", type=int, default=0, help="of the injected channels")
    parser.add_argument("--attention", action="store_true", help="of attention in int8, instead")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()

    progress = Console(stderr=True)
    model, token_ids = load_with_tokens(None, None, progress)
    if arguments.attention:
        # Fused attention has no products that a graph could show.
        model.set_attn_implementation("eager")
    settings = Settings(
        ATTENTION if arguments.attention else {spec: contender(spec) for spec in SPECS},
        windows=arguments.windows,
        factor=arguments.factor if arguments.inject else None,
        seed=arguments.seed,
        compiled=True,
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
