"""What linears read: the mean of x xᵀ over the rows of some batches.

That is all that GPTQ and AWQ ask of their data, whatever the number of rows. A linear of K columns has
K² floats of it, so as many linears as a limit has room for are watched in one run of the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from int8fx.weights.algorithms.basis import Basis

BYTES_AT_ONCE = 2**30


class Moment:
    """Of the input of one module."""

    def __init__(self, basis: Basis) -> None:
        self.basis, self.rows = basis, 0
        self.mean: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = self.basis.rows(x)
        self.rows += len(rows)
        if not len(rows):
            return
        share = len(rows) / self.rows
        mean = rows.t() @ rows / len(rows)
        self.mean = mean if self.mean is None else self.mean.lerp_(mean, share)


@torch.no_grad()
def second_moments(
    model: nn.Module, calls: Sequence[tuple[tuple, dict]], watched: Mapping[nn.Module, Basis]
) -> dict[nn.Module, Moment]:
    """Calls a model, by these positional and named arguments, and gives what modules read first."""
    moments = {module: Moment(basis) for module, basis in watched.items()}

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        moments[module].add((*args, *kwargs.values())[0])

    hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in moments]
    try:
        for args, kwargs in calls:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def in_parts(sizes: Sequence[int], most: int = BYTES_AT_ONCE) -> Iterator[slice]:
    """Consecutive linears, given their columns, whose moments take at most so many bytes; one at
    least."""
    start, total = 0, 0
    for index, K in enumerate(sizes):
        size = K * K * torch.float32.itemsize
        if index > start and total + size > most:
            yield slice(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))
