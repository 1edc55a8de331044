"""Triton's interpreter for single kernels, at any time, in a process that also compiles.

    interpret(kernel)[grid](*cpu_tensors, BLOCK=64)

``kernel`` is an ordinary ``@triton.jit`` function, and the environment variable ``TRITON_INTERPRET``
stays unset: with it set, torch cannot trace a ``triton_op``, and nothing can be compiled.

What the stock interpreter (triton 3.6 to 3.9) lacks for that, and ``install`` adds:

1. A ``@triton.jit`` function called from another raises; among them are ``tl.max``, ``tl.zeros`` and
   ``tl.cdiv``. They are routed to the interpreter.
2. A nested call patches ``triton.language`` and never restores it, after which nothing compiles in
   this process. The outermost kernel patches, and restores.
3. ``libdevice.*`` returns None. The functions that Inductor uses are given in numpy.
4. Inductor's own combine functions (``triton_helpers.max2`` and others) are reduced element by
   element in Python: seconds a row. They are mapped to numpy's reductions.
5. bf16 lives in the interpreter as its 16 bits. Casts between it and other types than fp32 give the
   bits' value as an integer, the cast from fp32 truncates, and ``tl.dot`` multiplies the bits. Casts
   go through fp32, rounding to nearest even, and so does ``tl.dot``, which is also given a BLAS for
   integers. So do ``+ - * /``, which compute with the bits, and minima and maxima, which compare them.
6. The result of a comparison carries the type of what was compared: made a block of, a scalar turns
   into integers, which no mask may be. It stays boolean.
7. triton 3.6 alone: minima, maxima and clamps that leave a NaN out pass it on, and ``tl.fma`` rounds
   twice. They get what 3.9 does; of fp32, ``tl.fma`` is computed in fp64. It needs numpy below 2.4.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import triton

# Binds the builtins min and max to tl.minimum and tl.maximum when it is imported, which has to
# happen before anything patches triton.language.
import triton.compiler.code_generator
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

_PREDICATES = frozenset({"isnan", "isinf", "signbit", "finitef", "isfinited"})

_LIBDEVICE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "cos": np.cos,
    "div_rn": np.divide,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fabs": np.abs,
    "finitef": np.isfinite,
    "float2int_rn": np.rint,
    "floor": np.floor,
    "fmod": np.fmod,
    "isfinited": np.isfinite,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "llrint": np.rint,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "pow": np.power,
    "rint": np.rint,
    "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "signbit": np.signbit,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "trunc": np.trunc,
}

_INDUCTOR_COMBINERS: dict[str, Callable[..., Any]] = {
    "maximum": np.max,
    "minimum": np.min,
    "_sum_combine": np.sum,
    "prod_accumulate": np.prod,
    "any_combine": np.any,
}


@functools.cache
def interpret(kernel: JITFunction | Callable[..., Any]) -> InterpretedFunction:
    """The interpreted twin of a kernel; launch it as ``twin[grid](...)`` on CPU tensors."""
    install()
    return InterpretedFunction(getattr(kernel, "fn", kernel))


@functools.cache
def install() -> None:
    """Adds to Triton's interpreter what is listed above. Compilation is not affected."""
    stock._patch_lang = _LANGUAGE.patch
    stock.ReduceOps.apply_impl = _with_numpy_combiners(stock.ReduceOps.apply_impl)
    builder = stock.InterpreterBuilder
    if not hasattr(stock, "_interpreter") or not hasattr(stock._interpreter, "fma_fp32"):
        _bring_up_to_date(builder)
    builder.create_dot = _dot
    builder.create_splat = _with_booleans(builder.create_splat)
    builder.cast_impl = _with_bf16(builder.cast_impl)
    builder.create_fp_to_fp = _with_bf16(builder.create_fp_to_fp)
    for name in ("fadd", "fsub", "fmul", "fdiv", "minimumf", "minnumf", "maximumf", "maxnumf"):
        setattr(builder, f"create_{name}", _in_fp32(getattr(builder, f"create_{name}")))
    JITFunction.__call__ = _nested_call


def _bring_up_to_date(builder: Any) -> None:
    """What releases do that have an fma of their own, on one that has none.

    Raises:
        RuntimeError: this numpy makes no scalar of an array of one, as such a release does everywhere.
    """
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} needs numpy < 2.4, and this is numpy "
            f"{np.__version__}"
        )
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_clampf = _clamp
    builder.create_fma = _fma
    builder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)


def _clamp(self: Any, x: Any, low: Any, high: Any, propagate_nans: Any) -> TensorHandle:
    if propagate_nans == tl.PropagateNan.NONE:
        return self.binary_op(self.binary_op(x, low, np.fmax), high, np.fmin)
    return self.ternary_op(x, low, high, np.clip)


def _fma(_self: Any, x: Any, y: Any, z: Any) -> TensorHandle:
    product = np.multiply(x.data, y.data, dtype=np.float64)
    return TensorHandle((product + z.data).astype(z.data.dtype), z.dtype.scalar)


def interpret_launches() -> None:
    """Runs in the interpreter, from now on, whatever is launched as ``kernel[grid](...)``.

    For good: nothing that is launched afterwards is compiled.
    """
    install()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        interpret(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = run


class _Language:
    """Patches ``triton.language`` for the outermost kernel, completely, and restores it after."""

    def __init__(self) -> None:
        self.depth = 0
        self._stock_patch = stock._patch_lang

    def patch(self, function: Callable[..., Any]) -> Any:
        if self.depth:
            return types.SimpleNamespace(restore=lambda: None)
        # The stock function looks for the language in the kernel's globals, where it may be missing.
        proxy = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        scope = self._stock_patch(proxy)
        _patch_libdevice(scope)
        self.depth += 1
        restore = scope.restore

        def leave() -> None:
            self.depth -= 1
            restore()

        scope.restore = leave
        return scope


_LANGUAGE = _Language()


def _patch_libdevice(scope: Any) -> None:
    import triton.language.extra.cuda.libdevice as of_cuda
    import triton.language.extra.libdevice as of_any

    for module in (of_any, of_cuda):
        for name in _LIBDEVICE:
            if hasattr(module, name):
                scope.set_attr(module, name, _libdevice(name))


def _libdevice(name: str) -> Callable[..., tl.tensor]:
    function = _LIBDEVICE[name]

    def call(*args: Any, _semantic: Any = None) -> tl.tensor:
        tensors = [stock.interpreter_semantic.to_tensor(argument) for argument in args]
        dtype = _result_dtype(name, tensors[0].dtype)
        with np.errstate(all="ignore"):
            result = np.asarray(function(*[tensor.handle.data for tensor in tensors]))
        result = result.astype(stock._get_np_dtype(dtype))
        block = tensors[0].type.is_block()
        type_ = tl.block_type(dtype, list(result.shape)) if block else dtype
        return tl.tensor(TensorHandle(result, dtype), type_)

    return call


def _result_dtype(name: str, dtype: tl.dtype) -> tl.dtype:
    if name in _PREDICATES or name == "float2int_rn":
        return tl.int32
    return tl.int64 if name == "llrint" else dtype


def _with_numpy_combiners(stock_apply: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, inputs: Any) -> Any:
        function = getattr(self.combine_fn, "fn", None)
        is_inductors = getattr(function, "__module__", "") == "torch._inductor.runtime.triton_helpers"
        reduce = _INDUCTOR_COMBINERS.get(function.__name__) if is_inductors else None
        if reduce is None or len(inputs) != 1:
            return stock_apply(self, inputs)
        reduced = reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, inputs[0].dtype)

    return apply


def _with_booleans(stock_splat: Callable[..., Any]) -> Callable[..., Any]:
    def splat(self: Any, block: Any, scalar: Any) -> Any:
        if scalar.data.dtype == np.bool_:
            return TensorHandle(np.full(block.shape, scalar.data), tl.int1)
        return stock_splat(self, block, scalar)

    return splat


def _dot(_self: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> TensorHandle:
    is_integer = np.issubdtype(d.data.dtype, np.integer)
    # float64 holds a sum of int8 products exactly, and has a BLAS.
    dtype = np.float64 if is_integer else np.float32
    with np.errstate(all="ignore"):
        product = _as_float(a, dtype) @ _as_float(b, dtype)
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _as_float(operand: Any, dtype: type) -> np.ndarray:
    is_bf16 = operand.dtype.scalar == tl.bfloat16
    return (_from_bf16(operand.data) if is_bf16 else operand.data).astype(dtype)


def _with_bf16(stock_cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in types:
            return stock_cast(self, source, target, *rounding)
        with np.errstate(all="ignore"):
            data = _as_float(source, np.float32)
            if target.scalar == tl.bfloat16:
                return TensorHandle(_to_bf16(data), tl.bfloat16)
            return TensorHandle(data.astype(stock._get_np_dtype(target)), target.scalar)

    return cast


def _in_fp32(stock_op: Callable[..., Any]) -> Callable[..., Any]:
    def op(self: Any, left: Any, right: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return stock_op(self, left, right)
        wide = (TensorHandle(_as_float(each, np.float32), tl.float32) for each in (left, right))
        return TensorHandle(_to_bf16(stock_op(self, *wide).data), left.dtype.scalar)

    return op


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32).astype(np.uint64)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, nearest_even).astype(np.uint16).reshape(data.shape)


def _nested_call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    if not _LANGUAGE.depth:
        raise RuntimeError("Cannot call @triton.jit'd outside of the scope of a kernel")
    return interpret(self.fn)(*args, **kwargs)
