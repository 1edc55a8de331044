"""Equal lengths: inputs that differ in their length alone, and do not now, keep one length.

Before::

    keys_0 [1, 2, s0, 16], values_0 [1, 2, s1, 16], keys_1 [1, 2, s2, 16], ...     s0 = s1 = s2 = ...

After::

    keys_0 [1, 2, s0, 16], values_0 [1, 2, s0, 16], keys_1 [1, 2, s0, 16], ...

The caches of a decoder's layers are such inputs: Dynamo gives each a length of its own, so that no two
layers are equal, and ``outline`` finds nothing that repeats. The equality becomes a guard of Dynamo's.
A later call whose lengths differ is compiled again.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.outline import BODY, LEAST_COPIES

# Keys and values of as many layers as ``outline`` asks for. Fewer may be of equal length by chance.
LEAST_INPUTS = 2 * LEAST_COPIES

FEW = f"fewer inputs than {LEAST_INPUTS} are alike but for a length"


def equal_lengths(graph: fx.Graph, context: Context) -> Result:
    """Changed: how many lengths are known to be another one."""
    result = Result()
    if graph is not context.root:
        result.refuse(BODY)
        return result
    alike: dict[Hashable, list[torch.SymInt]] = defaultdict(list)
    for node in graph.find_nodes(op="placeholder"):
        for likeness, length in _lengths(node.meta.get("example_value"), context):
            alike[likeness].append(length)
    for lengths in alike.values():
        different = len({str(length) for length in lengths}) - 1
        if len(lengths) < LEAST_INPUTS:
            result.refuse(FEW, different)
        elif different and all(lengths[0] == length for length in lengths):
            result.changed += different
    return result


def _lengths(value: Any, context: Context) -> list[tuple[Hashable, torch.SymInt]]:
    """The lengths of an input that vary, each with what inputs alike have in common: the length now,
    which dimension it is, and all else of their shape."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return []
    sizes: Sequence[Any] = value.shape
    shape = tuple(None if isinstance(size, torch.SymInt) else size for size in sizes)
    return [
        ((context.length_now(size), dim, shape, value.dtype, value.device), size)
        for dim, size in enumerate(sizes)
        if isinstance(size, torch.SymInt) and context.length_now(size) is not None
    ]
