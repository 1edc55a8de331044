"""Quantised weights of which each process holds a part: what FSDP2 exchanges, and putting one together.

FSDP2 cuts a parameter along one dimension, and puts together along the same what ``to_gather`` gives of
each part. Rows of the matrix come with their scales. Columns (of Hugging Face's ``Conv1D``, whose
parameter is ``[K, N]``, or by ``Shard(1)``) share the scales of their rows, which every process has.

Where parts differ in length, or are cut along the second dimension, FSDP2 takes nothing but tensors of
the shape of the longest part. Scales then go as a second matrix, of bytes: the first four of each row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int8fx.weights.tensor import QuantizedWeight


def whole(weight: Any) -> QuantizedWeight:
    """A weight of which each process holds a shard, put together in all of them.

    Rows are what they are alone, bit for bit. Of columns each process has scales of its own: they are
    put together in float, and quantised anew.

    Args:
        weight: a DTensor of ``QuantizedWeight``s.
    """
    part, placements = weight.to_local(), weight.placements

    def full(values: Tensor, placed: Any, shape: Sequence[int]) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        layout = {"run_check": False, "shape": torch.Size(shape), "stride": stride}
        return type(weight).from_local(values, weight.device_mesh, placed, **layout).full_tensor()

    rows = 1 if part.transposed else 0
    if not all(each.is_replicate() or each.is_shard(rows) for each in placements):
        floats = full(part.dequantize(torch.float32), placements, weight.shape)
        return part.quantize_like(floats)
    N, K = weight.shape[::-1] if part.transposed else weight.shape
    stored = []
    for spec, tensor in zip(part.weight_format.parts, part.stored(), strict=True):
        dim = spec.dim_of("N")
        whole_part = tensor
        if dim is not None:
            placed = [each if each.is_replicate() else type(each)(dim) for each in placements]
            whole_part = full(tensor, placed, spec.shape(N, K))
        stored.append(whole_part)
    return part.with_stored(stored, N, K)
