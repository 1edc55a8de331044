"""What the backend leaves in float because it is ranked, and whether ``quantize_`` leaves the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

import int8fx
from int8fx.compiler import pipeline
from int8fx.compiler.capture import capture
from int8fx.options import Options
from int8fx.passes.linears.decision import Decision


def backend_decisions(model: nn.Module, inputs: Mapping[str, Any]) -> list[Decision]:
    """What the backend decides on each linear of a model, which is traced, and runs in float."""
    found: list[Decision] = []

    def decide(gm: fx.GraphModule, args: Sequence[Any]) -> Any:
        compilation = capture(gm, args, Options())
        pipeline.canonicalize(compilation)
        pipeline.select(compilation)
        found.extend(compilation.decisions)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=decide)(**inputs)
    return found


def is_ranked(decision: Decision) -> bool:
    """Whether a linear stays in float because of what becomes of its output."""
    return decision.reason.startswith("skip: ") and "output is" in decision.reason


def apart_from_quantize(model: nn.Module, decisions: Sequence[Decision]) -> list[str]:
    """Paths of the linears that either the backend or ``quantize_`` leaves in float as ranked, but not
    both. Those that ``quantize_`` cannot quantise anyway are not apart."""
    of_quantize = {decision.path: decision for decision in int8fx.decisions(model)}
    ranked = {decision.path for decision in decisions if is_ranked(decision)}
    accepted = {decision.path for decision in decisions if decision.accepted}
    return [
        path
        for path, decision in of_quantize.items()
        if (decision.accepted and path in ranked)
        or (_as_ranked(decision) and path in accepted - ranked)
    ]


def _as_ranked(decision: Decision) -> bool:
    return decision.reason.startswith(("skip: a router", "skip: its output is ranked"))
