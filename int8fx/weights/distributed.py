"""Distributed weights: what this process holds of them."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor


def is_distributed(weight: Tensor) -> bool:
    """Whether each process holds a part of it, or a copy, as a DTensor."""
    # Importing it takes a second; without it no model can hold one.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(weight, distributed.DTensor)


def local(weight: Any) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if is_distributed(weight) else weight


def map_local(weight: Any, function: Callable[[Any], Tensor]) -> Tensor:
    """``function`` of the weight; of a distributed one, of the part in this process."""
    if not is_distributed(weight):
        return function(weight)
    return type(weight).from_local(
        function(weight.to_local()),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
