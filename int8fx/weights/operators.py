"""What torch's operators do with an ``Int8Weight``: one table.

An operator without a row reads the float values; one that would write to them is refused, but for
``copy_``, ``add_`` and ``sub_``, which quantise the result.
"""

from typing import Any

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.limits import DTYPES
from int8fx.torch_private import with_aliasing_of
from int8fx.weights.parts import Part
from int8fx.weights.tensor import Int8Weight, _on, _on_the_float_values, aten

# --- views ---------------------------------------------------------------------------------------


@_on(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: tuple, kwargs: dict) -> Any:
    return _view_of(func, args, kwargs, args[0].shape, args[0].stride())


@_on(aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
def _transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, *dimensions = args
    if weight.dim() != 2 or (func is aten.permute.default and _is_identity(dimensions[0])):
        return _on_the_float_values(func, args, kwargs)
    if func is aten.transpose.int and dimensions[0] % 2 == dimensions[1] % 2:
        return _alias(func, args, kwargs)
    size, stride = weight.shape[::-1], weight.stride()[::-1]
    return _view_of(func, args, kwargs, size, stride, transposed=not weight.transposed)


def _is_identity(order: list[int]) -> bool:
    return [dimension % len(order) for dimension in order] == list(range(len(order)))


@_on(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, args: tuple, kwargs: dict) -> Any:
    """The same shape, or flat: what FSDP2 asks for. Other shapes have no scale per row."""
    weight, size = args[0], tuple(args[1])
    if size == tuple(weight.shape):
        return _alias(func, args, kwargs)
    if size in ((-1,), (weight.numel(),)):
        return _view_of(func, args, kwargs, (weight.numel(),), (1,))
    return _on_the_float_values(func, args, kwargs)


@_on(aten.as_strided.default)
def _as_strided(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, size, stride = args[:3]
    if (tuple(size), tuple(stride)) != (tuple(weight.shape), weight.stride()):
        return _on_the_float_values(func, args, kwargs)
    return _alias(func, args, kwargs)


def _view_of(func: Any, args: tuple, kwargs: dict, size: Any, stride: Any, **changed: Any) -> Any:
    weight = args[0]
    view = weight.with_packed(
        weight.packed.detach(), weight.w_scale.detach(), size=size, stride=stride, **changed
    )
    view.part_of, view.released = weight.part_of, weight.released
    return with_aliasing_of(func, args, kwargs, view)


# --- parts, which are packed anew, and write to the whole ----------------------------------------


@_on(aten.slice.Tensor)
def _slice(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, dimension, start, end, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[:5]
    if step != 1 or weight.dim() != 2:
        return _on_the_float_values(func, args, kwargs)
    length = weight.shape[dimension]
    start, end, _ = slice(start, end).indices(length)
    if (start, end) == (0, length):
        return _alias(func, args, kwargs)
    return _part(weight, dimension, start, end)


@_on(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: tuple, kwargs: dict) -> Any:
    weight, sizes, dimension = (*args, 0)[:3]
    length = weight.shape[dimension]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(_part(weight, dimension, start, start + size))
        start += size
    return parts


def _part(weight: Int8Weight, dimension: int, start: int, end: int) -> Int8Weight:
    rows, columns = slice(0, weight.w_scale.shape[0]), slice(0, weight.K)
    if (dimension % 2 == 0) is not weight.transposed:
        rows = slice(start, end)
    else:
        columns = slice(start, end)
    w_int8 = weight.w_int8[rows, columns].contiguous()
    part = weight.like(w_int8, weight.w_scale[rows].clone())
    if type(weight.packed) is Tensor and not weight.is_meta:  # a traced one has no memory
        part.part_of = Part(weight, rows, columns)
    return part


# --- copies --------------------------------------------------------------------------------------


@_on(aten.clone.default)
def _clone(func: Any, args: tuple, kwargs: dict) -> Any:
    weight = args[0]
    stride = None if kwargs.get("memory_format") is torch.contiguous_format else weight.stride()
    return weight.with_packed(
        weight.packed.clone(), weight.w_scale.clone(), size=weight.shape, stride=stride
    )


@_on(aten._to_copy.default)
def _to(func: Any, args: tuple, kwargs: dict) -> Any:
    """To another device, packed for it; another float dtype is that of the values read from it."""
    weight, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    device = torch.device(kwargs.get("device") or weight.device)
    if not dtype.is_floating_point:
        return _on_the_float_values(func, args, kwargs)
    if device.type == "meta":
        return weight.on_meta(dtype=dtype)
    if device.type == weight.device.type:
        move = {"device": device, "copy": True}
        packed, w_scale = weight.packed.to(**move), weight.w_scale.to(**move)
        return weight.with_packed(packed, w_scale, dtype=dtype, size=weight.shape)
    return weight.like(weight.w_int8.to(device), weight.w_scale.to(device), dtype=dtype)


@_on(aten.copy_.default)
def _copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """Into an int8 weight: from another bit for bit, from a float tensor by quantising it."""
    target, source = args[:2]
    if not isinstance(target, Int8Weight):
        return target.copy_(source.dequantize())
    if tuple(target.shape) != tuple(source.shape):
        raise RuntimeError(
            f"an int8 weight of shape {list(target.shape)} cannot take the values of a tensor of "
            f"shape {list(source.shape)}"
        )
    if not isinstance(source, Int8Weight):
        source = _quantized(source, target)
    if source.transposed is not target.transposed:
        raise RuntimeError("an int8 weight cannot take the values of a transposed one: scales differ")
    if source.device.type != target.device.type:
        source = source.to(target.device)
    if target.part_of is not None:
        target.part_of.write(source.w_int8, source.w_scale)
    target.packed.copy_(source.packed)
    target.w_scale.copy_(source.w_scale)
    return target


@_on(aten.add_.Tensor, aten.sub_.Tensor)
def _add(func: Any, args: tuple, kwargs: dict) -> Any:
    """Merging an adapter (peft) adds to the weight: the sum is quantised again."""
    target, other = args
    if not isinstance(target, Int8Weight):
        return _on_the_float_values(func, args, kwargs)
    values = target.dequantize(torch.float32)
    return target.copy_(func(values, other, **kwargs))


def _quantized(source: Tensor, target: Int8Weight) -> Int8Weight:
    if not source.is_floating_point():
        raise RuntimeError(
            f"an int8 weight of shape {list(target.shape)} cannot take the values of a tensor of "
            f"{source.dtype} without scales"
        )
    return Int8Weight.from_float(
        source,
        **target.activation_options,
        transposed=target.transposed,
    )


@_on(aten.empty_like.default)
def _empty_like(func: Any, args: tuple, kwargs: dict) -> Any:
    """``Module.to_empty`` makes so what values are to be loaded into; others want a float tensor."""
    weight, device = args[0], torch.device(kwargs.get("device") or args[0].device)
    if not weight.is_meta or device.type == "meta":
        return _on_the_float_values(func, args, kwargs)
    w_int8 = torch.zeros(weight.w_scale.shape[0], weight.K, dtype=torch.int8, device=device)
    return weight.like(w_int8, torch.zeros_like(weight.w_scale, device=device))


@_on(aten.new_zeros.default)
def _new_zeros(func: Any, args: tuple, kwargs: dict) -> Any:
    """FSDP2 makes a shard so, of some rows or some columns, and copies its part into it."""
    weight, size = args[0], tuple(args[1])
    form = size[::-1] if weight.transposed else size
    if kwargs.get("dtype") or not _is_shard(form, (weight.w_scale.shape[0], weight.K)):
        return weight.w_scale.new_zeros(size, **({"dtype": weight.dtype} | kwargs))
    w_int8 = torch.zeros(form, dtype=torch.int8, device=weight.device)
    return weight.like(w_int8, weight.w_scale.new_zeros(form[0]))


def _is_shard(form: tuple[int, ...], whole: tuple[int, int]) -> bool:
    """Whether it is rows of a matrix; or columns, which only several processes ask for. A process that
    holds none asks for as many as the others hold."""
    in_processes = torch.distributed.is_available() and torch.distributed.is_initialized()
    return len(form) == 2 and (form[1] == whole[1] or (in_processes and form[0] == whole[0]))


@_on(aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple, kwargs: dict) -> bool:
    return args[0].packed.is_pinned()


@_on(aten.equal.default)
def _equal(func: Any, args: tuple, kwargs: dict) -> bool:
    left, right = args
    if not (isinstance(left, Int8Weight) and isinstance(right, Int8Weight)):
        return _on_the_float_values(func, args, kwargs)
    same_form = left.shape == right.shape and left.transposed == right.transposed
    return same_form and left.packed.equal(right.packed) and left.w_scale.equal(right.w_scale)


# --- products ------------------------------------------------------------------------------------


@_on(aten.linear.default)
def _linear(func: Any, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = (*args, None)[:3]
    if not isinstance(weight, Int8Weight):
        return _on_the_float_values(func, args, kwargs)
    y = _product(x.reshape(-1, x.shape[-1]), _transposed(weight), bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@_on(aten.mm.default)
def _mm(func: Any, args: tuple, kwargs: dict) -> Any:
    left, right = args
    if not isinstance(right, Int8Weight):
        return _product(right.t(), _transposed(left), None).t()
    if isinstance(left, Int8Weight):
        return _on_the_float_values(func, args, kwargs)
    return _product(left, right, None)


@_on(aten.addmm.default)
def _addmm(func: Any, args: tuple, kwargs: dict) -> Any:
    addend, left, right = args
    plain = addend.dim() == 1 and addend.shape[0] == right.shape[1]
    if kwargs or not plain or not isinstance(right, Int8Weight) or isinstance(left, Int8Weight):
        y = aten.mm.default(left, right) * kwargs.get("alpha", 1)
        return y + addend * kwargs.get("beta", 1)
    return _product(left, right, addend)


def _transposed(weight: Int8Weight) -> Int8Weight:
    size, stride = weight.shape[::-1], weight.stride()[::-1]
    return weight.with_packed(
        weight.packed, weight.w_scale, transposed=not weight.transposed, size=size, stride=stride
    )


def _product(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """``x [M, in] @ weight [in, out] + bias``.

    Over K it is LLM.int8(). Over N, as in the gradient of that with respect to its input, no scale
    can be taken out of the sum, and the values are those of the de-quantised weight.
    """
    if not weight.transposed or x.dtype not in DTYPES:
        y = x @ weight.dequantize(x.dtype)
        return y if bias is None else y + bias
    threshold, decomposition = weight.threshold, weight.decomposition
    joined = table.joined(x.device.type)
    if joined is not None:
        operator, _ = joined
        biases = [] if bias is None else [bias]
        return operator(x, threshold, decomposition, [weight.packed], [weight.w_scale], biases)[0]
    x_int8, x_scale, x_outlier, columns = ops.quantize(x, threshold, decomposition)
    outliers = (x, None) if threshold == 0 else (x_outlier, columns)
    return ops.int8_linear(x_int8, x_scale, *outliers, weight.packed, weight.w_scale, bias)
