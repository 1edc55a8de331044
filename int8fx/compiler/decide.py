"""canonicalize and select: finds every linear of a compile, and decides on each."""

import functools
import logging
import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.kernels import table
from int8fx.kernels.schemes import experts
from int8fx.kernels.schemes.int8 import ABSMAX_VECTOR
from int8fx.kernels.schemes.scheme import Choice
from int8fx.options import Options
from int8fx.passes.graph.transforms import leave_transforms
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.passes.linears.canonicalize import Candidate, candidates
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.low_rank import factors
from int8fx.passes.linears.ranking import Rankings
from int8fx.passes.linears.select import (
    REQUIRES_GRAD,
    Selection,
    is_embedding,
    module_path,
    refusal,
    shape_of_weight,
)
from int8fx.weights.store import weight_reason
from int8fx.weights.tensor import QuantizedWeight

log = logging.getLogger(__name__)


# What a product of two activations is: a scale per token, and no outliers.
OF_ACTIVATIONS = ABSMAX_VECTOR.name


def canonicalize(compilation: Compilation) -> None:
    """Finds every linear and matmul, in one form whatever its spelling."""
    leave_transforms(compilation.root, torch_private.is_level_wrapper)
    compilation.found = candidates(
        compilation.root, compilation.paths.get, compilation.options.attention
    )


def select(compilation: Compilation) -> None:
    """Decides which are rewritten."""
    options = compilation.options
    rankings = Rankings(compilation.root, compilation.tensors.__contains__)
    shapes = {
        candidate: shape_of_weight(candidate.weight, compilation.tensors)
        for candidate in compilation.found
        if candidate.weight is not None
    }
    selection = Selection(
        tensors=compilation.tensors,
        paths=compilation.paths,
        skip=options.skip,
        only=options.only,
        skips_by_default=options.skips_by_default,
        kernel_reason=functools.partial(_kernel_reason, options),
        memory=compilation.memory(),
        records_gradients=compilation.records_gradients,
        weight_reason=functools.partial(_weight_reason, options),
        ranked_by=rankings.ranked_by,
        factors=factors(shapes, rankings.origins),
        attention=options.attention,
        quantizes_head=options.quantizes_head,
    )
    for candidate in compilation.found:
        reason = refusal(candidate, selection)
        dimensions = shapes.get(candidate, ())
        path = module_path(candidate, selection)
        choice = _choice(compilation, candidate, path)
        routed = candidate.routing is not None
        if not reason and routed and experts.lowering(choice) is None:
            reason = f"scheme {choice.scheme.name!r} has no product for experts"
        if not reason and routed:
            reason = _without_experts(candidate, choice)
        if not reason and candidate.weight is not None and not routed:
            reason = _slower(candidate, choice)
        decision = Decision(
            path=path,
            spelling=candidate.spelling,
            shape=(dimensions[-2], dimensions[-1]) if len(dimensions) in (2, 3) else None,
            accepted=not reason,
            reason=reason,
            scheme="" if reason else OF_ACTIVATIONS if candidate.weight is None else choice.scheme.name,
            experts=dimensions[0] if len(dimensions) == 3 else 0,
            note="" if reason or candidate.weight is None else _note(compilation, candidate, choice),
        )
        log.debug("%s", decision)
        compilation.decisions.append(decision)
        if not reason:
            compilation.accepted.append(candidate)
        if not reason and candidate.weight is not None:
            choice = options.calibrated(choice, path, (dimensions[-2], dimensions[-1]))
            compilation.choices[candidate] = choice
            product = experts.lowering(choice) if routed else choice.lower
            assert product is not None
            compilation.products[candidate] = product
    _warn_of_trainable(compilation.decisions)


def _note(compilation: Compilation, candidate: Candidate, choice: Choice) -> str:
    """How a product is computed where no kernel does, and what else keeps its float weight."""
    assert candidate.weight is not None and candidate.x is not None
    device = candidate.x.meta["example_value"].device.type
    notes = [choice.note(device), experts.note(choice) if candidate.routing is not None else ""]
    if is_embedding(candidate):
        mib = compilation.tensors[candidate.weight.placeholder].nbytes / 2**20
        notes.append(f"the embedding keeps the float weight, {mib:.1f} MiB, for its look-up")
    return "; ".join(filter(None, notes))


def _choice(compilation: Compilation, candidate: Candidate, path: str) -> Choice:
    if candidate.weight is None:
        return compilation.options.choice(path)
    return _choice_of(compilation.options, path, compilation.tensors[candidate.weight.placeholder])


def _choice_of(options: Options, path: str, weight: Tensor) -> Choice:
    return options.choice(path, weight.choice if isinstance(weight, QuantizedWeight) else None)


def _slower(candidate: Candidate, choice: Choice) -> str:
    """Why the product that a scheme makes of a candidate would lose time, or empty."""
    assert candidate.x is not None
    x = candidate.x.meta["example_value"]
    return table.slower(x.device.type, choice.scheme.name, math.prod(x.shape[:-1]))


def _without_experts(candidate: Candidate, choice: Choice) -> str:
    """Why a device has no product of experts for a scheme, or empty."""
    assert candidate.x is not None
    device = candidate.x.meta["example_value"].device.type
    return table.without_experts(device, choice.operator)


def _weight_reason(options: Options, path: str, tensor: Tensor, expression: WeightExpression) -> str:
    return weight_reason(tensor, expression, _choice_of(options, path, tensor).weight_format)


def _kernel_reason(options: Options, path: str, weight: Tensor) -> str | None:
    return _choice_of(options, path, weight).refusal(weight.device.type)


def _warn_of_trainable(decisions: Sequence[Decision]) -> None:
    trainable = sum(decision.reason == REQUIRES_GRAD for decision in decisions)
    if trainable:
        warnings.warn(
            f"llmint8 left {trainable} linears in float, because their weights require grad: call "
            "the model under torch.no_grad(), or freeze it with model.requires_grad_(False)",
            UserWarning,
            stacklevel=2,
        )
