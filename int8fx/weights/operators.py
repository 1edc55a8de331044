"""What torch's operators do with a ``QuantizedWeight`` of whatever format: one table.

An operator without a row reads the float values; one that would write to them is refused, but for
``copy_``, ``add_`` and ``sub_``, which quantise the result.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.devices import has_memory, same_kind
from int8fx.kernels.ops.limits import DTYPES
from int8fx.torch_private import with_aliasing_of
from int8fx.weights import expert_operators, row_parallel
from int8fx.weights.pieces import Piece
from int8fx.weights.tensor import QuantizedWeight, aten, handles, on_float_values

# --- views ---------------------------------------------------------------------------------------


@handles(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: tuple, kwargs: dict) -> Any:
    return _view_of(func, args, kwargs, args[0].shape, args[0].stride())


@handles(aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
def _transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, *dimensions = args
    if weight.batch:
        return expert_operators.transpose(func, args, kwargs)
    if weight.dim() != 2 or (func is aten.permute.default and _is_identity(dimensions[0])):
        return on_float_values(func, args, kwargs)
    if func is aten.transpose.int and dimensions[0] % 2 == dimensions[1] % 2:
        return _alias(func, args, kwargs)
    size, stride = weight.shape[::-1], weight.stride()[::-1]
    return _view_of(func, args, kwargs, size, stride, transposed=not weight.transposed)


def _is_identity(order: list[int]) -> bool:
    return [dimension % len(order) for dimension in order] == list(range(len(order)))


@handles(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, args: tuple, kwargs: dict) -> Any:
    """The same shape, or flat: what FSDP2 asks for. Other shapes have no scale per row."""
    weight, size = args[0], tuple(args[1])
    if size == tuple(weight.shape):
        return _alias(func, args, kwargs)
    if size in ((-1,), (weight.numel(),)):
        return _view_of(func, args, kwargs, (weight.numel(),), (1,))
    return on_float_values(func, args, kwargs)


@handles(aten.as_strided.default)
def _as_strided(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, size, stride = args[:3]
    if (tuple(size), tuple(stride)) != (tuple(weight.shape), weight.stride()):
        return on_float_values(func, args, kwargs)
    return _alias(func, args, kwargs)


def _view_of(func: Any, args: tuple, kwargs: dict, size: Any, stride: Any, **changed: Any) -> Any:
    weight = args[0]
    packed = [tensor.detach() for tensor in weight.tensors]
    view = weight.with_packed(packed, size=size, stride=stride, **changed)
    view.part_of, view.released = weight.part_of, weight.released
    view.shares_columns_as(weight)
    return with_aliasing_of(func, args, kwargs, view)


# --- parts, which are packed anew, and write to the whole ----------------------------------------


@handles(aten.slice.Tensor)
def _slice(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, dimension, start, end, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[:5]
    if step != 1 or weight.dim() != 2:
        return on_float_values(func, args, kwargs)
    length = weight.shape[dimension]
    start, end, _ = slice(start, end).indices(length)
    if (start, end) == (0, length):
        return _alias(func, args, kwargs)
    part = _part(weight, dimension, start, end)
    return on_float_values(func, args, kwargs) if part is None else part


@handles(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, sizes, dimension = (*args, 0)[:3]
    length = weight.shape[dimension]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(_part(weight, dimension, start, start + size))
        start += size
    return on_float_values(func, args, kwargs) if None in parts else parts


def _part(weight: QuantizedWeight, dimension: int, start: int, end: int) -> QuantizedWeight | None:
    """Some rows or columns; None where the format cannot be cut there."""
    rows, columns = slice(0, weight.N), slice(0, weight.K)
    if (dimension % 2 == 0) is not weight.transposed:
        rows = slice(start, end)
    else:
        columns = slice(start, end)
    if not weight.weight_format.can_cut(rows, columns, weight.N, weight.K):
        return None
    stored = weight.weight_format.cut(weight.stored(), rows, columns)
    part = weight.with_stored(stored, rows.stop - rows.start, columns.stop - columns.start)
    if type(weight.packed) is Tensor and not weight.is_meta:  # a traced one has no memory
        part.part_of = Piece(weight, rows, columns)
    return part


# --- copies --------------------------------------------------------------------------------------


@handles(aten.clone.default)
def _clone(func: Any, args: tuple, kwargs: dict) -> Any:
    weight = args[0]
    stride = None if kwargs.get("memory_format") is torch.contiguous_format else weight.stride()
    packed = [tensor.clone() for tensor in weight.tensors]
    cloned = weight.with_packed(packed, size=weight.shape, stride=stride)
    cloned.columns_among = weight.columns_among
    return cloned


@handles(aten._to_copy.default)
def _to(func: Any, args: tuple, kwargs: dict) -> Any:
    """To another device, packed for it; another float dtype is that of the values read from it."""
    weight, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    device = torch.device(kwargs.get("device") or weight.device)
    if not dtype.is_floating_point:
        return on_float_values(func, args, kwargs)
    if not has_memory(device):
        return weight.on_meta(dtype=dtype)
    if same_kind(device, weight.device):
        move = {"device": device, "copy": True}
        packed = [tensor.to(**move) for tensor in weight.tensors]
        return weight.with_packed(packed, dtype=dtype, size=weight.shape)
    stored = [part.to(device) for part in weight.stored()]
    return weight.with_stored(stored, weight.N, weight.K, dtype=dtype)


@handles(aten.copy_.default)
def _copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """Into a quantised weight: from another of its format bit for bit, else by quantising."""
    target, source = args[:2]
    if not isinstance(target, QuantizedWeight):
        return target.copy_(source.dequantize())
    if tuple(target.shape) != tuple(source.shape):
        raise RuntimeError(
            f"{target.described} cannot take the values of a tensor of shape {list(source.shape)}"
        )
    if isinstance(source, QuantizedWeight) and source.transposed is not target.transposed:
        raise RuntimeError(
            f"{target.weight_format.a_weight} cannot take the values of a transposed one: scales differ"
        )
    source = _in_format_of(target, source)
    if not same_kind(source.device, target.device):
        source = source.to(target.device)
    if target.part_of is not None:
        target.part_of.write(*source.stored())
    for ours, theirs in zip(target.tensors, source.tensors, strict=True):
        ours.copy_(theirs)
    # Scales of another weight may not be those of the other processes.
    if source.columns_among != target.columns_among:
        target.no_longer_shares_columns()
    return target


@handles(aten.add_.Tensor, aten.sub_.Tensor)
def _add(func: Any, args: tuple, kwargs: dict) -> Any:
    """Merging an adapter (peft) adds to the weight: the sum is quantised again.

    In fewer than 8 bits a warning says so. Taking it away again says nothing more.
    """
    target, other = args
    if not isinstance(target, QuantizedWeight):
        return on_float_values(func, args, kwargs)
    if func is aten.add_.Tensor and target.weight_format.bits < 8:
        warnings.warn(
            f"what is added to {target.weight_format.a_weight}, as an adapter that is merged, is "
            "quantised again with it, and partly rounded away. `import int8fx.integrations.peft` "
            "before merging lets peft bring the base back bit for bit",
            UserWarning,
            stacklevel=2,
        )
    values = target.dequantize(torch.float32)
    return target.copy_(func(values, other, **kwargs))


def _in_format_of(target: QuantizedWeight, source: Tensor) -> QuantizedWeight:
    weight_format = target.weight_format
    if isinstance(source, QuantizedWeight):
        if source.weight_format.name == weight_format.name:
            return source
        if source.weight_format.files == weight_format.files:
            return target.with_stored(source.stored(), target.N, target.K)
        source = source.dequantize(torch.float32)
    if not source.is_floating_point():
        raise RuntimeError(
            f"{target.described} cannot take the values of a tensor of {source.dtype} without scales"
        )
    return target.quantize_like(source)


@handles(aten.empty_like.default)
def _empty_like(func: Any, args: tuple, kwargs: dict) -> Any:
    """``Module.to_empty`` makes so what values are to be loaded into; others want a float tensor."""
    weight, device = args[0], torch.device(kwargs.get("device") or args[0].device)
    if not weight.is_meta or not has_memory(device):
        return on_float_values(func, args, kwargs)
    return weight.with_stored(weight.zeros(weight.N, weight.K, device), weight.N, weight.K)


@handles(aten.new_zeros.default)
def _new_zeros(func: Any, args: tuple, kwargs: dict) -> Any:
    """FSDP2 makes a shard so, of some rows or some columns, and copies its part into it."""
    weight, size = args[0], tuple(args[1])
    form = size[::-1] if weight.transposed else size
    if kwargs.get("dtype") or not _is_shard(form, weight):
        options = {"dtype": weight.dtype, "device": weight.device} | kwargs
        return torch.zeros(size, **options)
    return weight.with_stored(weight.zeros(*form, weight.device), *form)


def _is_shard(form: tuple[int, ...], weight: QuantizedWeight) -> bool:
    """Whether it is rows of a matrix; or columns, which only several processes ask for. A process that
    holds none asks for as many as the others hold."""
    in_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
    if len(form) != 2:
        return False
    weight_format, (rows, columns) = weight.weight_format, (slice(0, each) for each in form)
    if form[1] == weight.K:
        return weight_format.can_cut(rows, columns, rows.stop, weight.K)
    whole = form[0] == weight.N and in_processes
    return whole and weight_format.can_cut(rows, columns, weight.N, max(columns.stop, weight.K))


@handles(aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple, kwargs: dict) -> bool:
    return args[0].packed.is_pinned()


@handles(aten.equal.default)
def _equal(func: Any, args: tuple, kwargs: dict) -> bool:
    left, right = args
    if not (isinstance(left, QuantizedWeight) and isinstance(right, QuantizedWeight)):
        return on_float_values(func, args, kwargs)
    if left.shape != right.shape or left.transposed != right.transposed:
        return False
    if left.weight_format.name != right.weight_format.name:
        return False
    return all(mine.equal(other) for mine, other in zip(left.tensors, right.tensors, strict=True))


# --- products ------------------------------------------------------------------------------------


@handles(aten.linear.default)
def _linear(func: Any, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = (*args, None)[:3]
    if not isinstance(weight, QuantizedWeight):
        return on_float_values(func, args, kwargs)
    y = _product(x.reshape(-1, x.shape[-1]), _transposed(weight), bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@handles(aten.mm.default)
def _mm(func: Any, args: tuple, kwargs: dict) -> Any:
    left, right = args
    if not isinstance(right, QuantizedWeight):
        return _product(right.t(), _transposed(left), None).t()
    if isinstance(left, QuantizedWeight):
        return on_float_values(func, args, kwargs)
    return _product(left, right, None)


@handles(aten.addmm.default)
def _addmm(func: Any, args: tuple, kwargs: dict) -> Any:
    addend, left, right = args
    plain = addend.dim() == 1 and addend.shape[0] == right.shape[1]
    if (
        kwargs
        or not plain
        or not isinstance(right, QuantizedWeight)
        or isinstance(left, QuantizedWeight)
    ):
        y = aten.mm.default(left, right) * kwargs.get("alpha", 1)
        return y + addend * kwargs.get("beta", 1)
    return _product(left, right, addend)


def _transposed(weight: QuantizedWeight) -> QuantizedWeight:
    size, stride = weight.shape[::-1], weight.stride()[::-1]
    changed = {"transposed": not weight.transposed, "size": size, "stride": stride}
    turned = weight.with_packed(weight.tensors, **changed)
    turned.columns_among = weight.columns_among
    return turned


def _product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x [M, in] @ weight [in, out] + bias``.

    Over K it is the scheme's. Over N, as in the gradient of that with respect to its input, no scale
    can be taken out of the sum, and the values are those of the de-quantised weight.
    """
    if not weight.transposed or x.dtype not in DTYPES:
        y = x @ weight.dequantize(x.dtype)
        return y if bias is None else y + bias
    if weight.columns_among:
        return row_parallel.product(x, weight, bias)
    return weight.choice.product(x, weight.tensors, bias)
