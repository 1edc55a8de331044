"""Whether a linear form computes what its call does, by their shapes, before anything is rewritten.

Rules about shapes are many (what broadcasts, what is contracted, what has no rows), and a form that
misses one would break the graph. So each form's shape is worked out on the values that Dynamo knows,
and compared with the call's.
"""

import torch
from torch import Tensor

from int8fx.passes.graph.values import (
    differ,
    no_tensor_reason,
    same_shape,
    same_size,
    tensor_of,
)
from int8fx.passes.linears.candidate import Candidate


def form_shape(candidate: Candidate) -> tuple:
    """Of ``y = x @ weightᵀ``, with ``x_steps``, ``y_steps`` and what is added.

    Raises:
        ValueError: x has not the weight's K.
    """
    assert candidate.weight is not None
    x, addend = tensor_of(candidate.x), tensor_of(candidate.addend)
    assert x is not None
    *_, N, K = candidate.weight.meta().shape
    with torch.no_grad():
        for step in candidate.x_steps:
            x = step(x)
        if differ(x.shape[-1], K):
            raise ValueError(f"the weight's K is {K}, and the input's {x.shape[-1]}")
        shape = (*x.shape[:-1], N)
        if not candidate.y_steps and addend is None:
            return shape
        y: Tensor = x.new_empty(shape)
        for step in candidate.y_steps:
            y = step(y)
        return tuple(y.shape if addend is None else torch.add(y, addend).shape)


def misfit(candidate: Candidate) -> str:
    """Why a candidate's form has not the shape of its call, or empty."""
    y = tensor_of(candidate.node)
    if reason := no_tensor_reason(candidate.x, candidate.node):
        return reason
    assert y is not None
    try:
        shape = form_shape(candidate)
    except ValueError as error:
        return str(error)
    if same_shape(shape, tuple(y.shape)):
        return ""
    return f"its linear form has the shape {list(shape)}, and its result {list(y.shape)}"


def repetition(shape: tuple, wanted: tuple) -> list[tuple] | str:
    """The calls that repeat a result to a shape that it broadcasts to, or why there are none; no calls
    for any other shape."""
    new = len(wanted) - len(shape)
    if new < 0 or same_shape(shape, wanted):
        return []
    sizes = list(wanted[:new])
    for have, want in zip(shape, wanted[new:], strict=True):
        if same_size(have, want):
            sizes.append(-1)
        elif same_size(have, 1):
            sizes.append(want)
        else:
            return []
    if not all(isinstance(size, int) for size in sizes):
        return "the weight is repeated by a size that varies"
    return [("expand", *sizes)]
