"""A weight format: which tensors a float weight is kept as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WeightFormat:
    """How a float weight ``[N, K]`` is kept.

    Attributes:
        name: for people, and the part of a store's key that says which form this is.
        parts: names of the tensors, in order.
        quantize: ``weight [N, K]`` of any floating dtype to these tensors.
        dequantize: ``(tensors, N, K)`` to ŵ ``[N, K]`` fp32.
    """

    name: str
    parts: tuple[str, ...]
    quantize: Callable[[Tensor], tuple[Tensor, ...]]
    dequantize: Callable[[Sequence[Tensor], int, int], Tensor]
