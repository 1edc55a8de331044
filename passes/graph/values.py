"""What a node's value is, as Dynamo knows it: tensors without contents, ``meta["example_value"]``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def tensor_of(node: Any) -> Tensor | None:
    """None for what is no node, or no tensor, or a nested one, which no operator of ours takes."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) and not value.is_nested else None


def no_tensor_reason(x: Any, y: Any) -> str:
    """Why no operator of ours can take x and answer with y, or empty: both are tensors."""
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    if isinstance(value, Tensor) and value.is_nested:
        return "the input is a nested tensor"
    known = tensor_of(x) is not None and tensor_of(y) is not None
    return "" if known else "its input or its result is no tensor"


def device_type(node: fx.Node) -> str:
    """Of a node that is a tensor."""
    return node.meta["example_value"].device.type


def shape_of(node: Any) -> Any:
    """A tuple, of symbols where a size varies; or None."""
    value = tensor_of(node)
    return None if value is None else tuple(value.shape)


def rank_of(node: Any) -> int | None:
    value = tensor_of(node)
    return None if value is None else value.dim()


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard on symbols."""
    return statically_known_true(left == right)


def differ(left: Any, right: Any) -> bool:
    """Whether two sizes are known not to be equal, without a guard on symbols."""
    return statically_known_true(left != right)


def same_shape(left: tuple, right: tuple) -> bool:
    return len(left) == len(right) and all(map(same_size, left, right))


def is_dense(value: Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor is known to lie in memory without gaps, its dimensions in this order.

    No guard is put on a size that depends on data, as ``is_contiguous`` would.
    """
    expected: Any = 1
    for dim in reversed(order):
        size = value.shape[dim]
        if not same_size(size, 1) and not same_size(value.stride(dim), expected):
            return same_size(value.numel(), 0)
        expected = expected * torch.sym_max(size, 1)
    return True
