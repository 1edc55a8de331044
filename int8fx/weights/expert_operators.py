"""What torch's operators do with a batch of quantised matrices, as experts are: ``[E, N, K]``.

One expert is a view, the weight of an ordinary linear. Some experts are a copy of their packed parts. A
product of rows that each meet the matrix of their own expert is the scheme's
(``kernels/schemes/experts.py``), in the spellings that transformers has: ``grouped_mm`` of sorted rows,
and ``bmm`` with a matrix for each.
"""

from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.schemes import experts
from int8fx.kernels.schemes.scheme import eagerly
from int8fx.torch_private import with_aliasing_of
from int8fx.weights.tensor import QuantizedWeight, aten, handles, on_float_values


@handles(aten.select.int)
def _select(func: Any, args: tuple, kwargs: dict) -> Any:
    """One expert; of one matrix a row, which has no form of its own."""
    weight, dim, e = args
    if not weight.batch or dim % 3 != 0:
        return on_float_values(func, args, kwargs)
    (E,) = weight.batch
    if not -E <= e < E:
        raise IndexError(f"expert {e} of {E}: allowed are {-E} to {E - 1}")
    packed = [tensor.detach() for tensor in weight.weight_format.matrix_of(weight.tensors, e % E)]
    one = weight.with_packed(packed, batch=(), size=weight.shape[1:], stride=weight.stride()[1:])
    return with_aliasing_of(func, args, kwargs, one)


@handles(aten.index.Tensor, aten.index_select.default)
def _some(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, *rest = args
    index = _index_of(func, rest)
    if not isinstance(weight, QuantizedWeight) or not weight.batch or index is None:
        return on_float_values(func, args, kwargs)
    parts = weight.weight_format.parts
    taken = [
        tensor[index] if position < len(parts) or tensor.shape[:1] == weight.batch else tensor
        for position, tensor in enumerate(weight.tensors)
    ]
    return weight.with_packed(taken, batch=(len(index),))


def _index_of(func: Any, rest: list) -> Tensor | None:
    """The experts that are asked for, ``[S]``; None: something else is."""
    if func is aten.index_select.default:
        dim, index = rest
        return index if dim == 0 else None
    (indices,) = rest
    index = indices[0] if len(indices) == 1 else None
    integers = (torch.int64, torch.int32)
    return index if index is not None and index.dim() == 1 and index.dtype in integers else None


@handles(aten.expand.default)
def _expand(func: Any, args: tuple, kwargs: dict) -> Any:
    """To the size that it has, as ``torch.matmul`` of two batches asks."""
    weight, size = args[:2]
    same = (
        all(wanted in (-1, have) for wanted, have in zip(size, weight.shape, strict=False))
        and len(size) == weight.dim()
    )
    return aten.alias.default(weight) if same else on_float_values(func, args, kwargs)


@handles(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def _grouped_mm(func: Any, args: tuple, kwargs: dict) -> Any:
    """``x [S, K]``, sorted by expert, with ``weight [E, K, N]``."""
    x, weight, *rest = args
    ends: Any = rest[0] if rest else kwargs.get("offs")
    options = [*rest[1:], *(value for name, value in kwargs.items() if name != "offs")]
    plain = isinstance(weight, QuantizedWeight) and weight.batch and x.dim() == 2 and ends is not None
    if not plain or any(each is not None and each != x.dtype for each in options):
        return on_float_values(func, args, kwargs)
    if not weight.transposed or x.dtype not in DTYPES:
        return _over_rows(x, weight, ends)
    return _product_of(weight)(eagerly, x, weight.tensors, (None, ends))


def _product_of(weight: QuantizedWeight) -> Any:
    product = experts.lowering(weight.choice)
    assert product is not None  # quantize_ has asked
    return product


def _over_rows(x: Tensor, weight: QuantizedWeight, ends: Tensor) -> Tensor:
    """``x[s] @ weight[e]`` by values, one expert at a time: over N no scale leaves the sum."""
    y, start = x.new_zeros(len(x), weight.shape[2]), 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            one: Any = weight[e]
            y[start:end] = x[start:end] @ one.dequantize(x.dtype)
        start = end
    return y


@handles(aten.bmm.default)
def _bmm(func: Any, args: tuple, kwargs: dict) -> Any:
    left, right = args
    if isinstance(right, QuantizedWeight) and not isinstance(left, QuantizedWeight):
        return _of_batches(func, args, left, right)
    if isinstance(left, QuantizedWeight) and not isinstance(right, QuantizedWeight):
        turned: Any = left.transpose(-2, -1)
        return _of_batches(func, args, right.transpose(-2, -1), turned).transpose(-2, -1)
    return on_float_values(func, args, kwargs)


def _of_batches(func: Any, args: tuple, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x [B, M, K] @ weight [B, K, N]``."""
    B, M, _ = x.shape
    ends = torch.arange(1, B + 1, dtype=torch.int32, device=x.device) * M
    rows = x.reshape(B * M, x.shape[2])
    if weight.transposed and x.dtype in DTYPES:
        y = _product_of(weight)(eagerly, rows, weight.tensors, (None, ends))
    else:
        y = _over_rows(rows, weight, ends)
    return y.view(B, M, y.shape[1])


def transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    """Of each matrix; another order of the dimensions is one of float values."""
    weight, *dims = args
    if func is not aten.transpose.int or {dim % 3 for dim in dims} != {1, 2}:
        return on_float_values(func, args, kwargs)
    size, stride = ([each[0], each[2], each[1]] for each in (weight.shape, weight.stride()))
    packed = [tensor.detach() for tensor in weight.tensors]
    changed = {"size": size, "stride": stride, "transposed": not weight.transposed}
    view = weight.with_packed(packed, **changed)
    view.released = weight.released
    return with_aliasing_of(func, args, kwargs, view)
