"""Norms, in the spellings that models have for them.

    F.layer_norm(x, (K,), weight, bias, eps)                   torch.rms_norm(x, (K,), weight, eps)

    x32 = x.float()                                            Llama, Mistral, Qwen, T5 and many more
    weight * (x32 * rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

or the product with the weight in fp32 and the cast last, as OLMo has it. The weight may be read as
``weight.data``, as vLLM does it.
"""

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.kernels.ops.limits import DTYPES
from int8fx.passes.graph.values import shape_of, tensor_of

_ADD = frozenset({operator.add, torch.add, "add"})
_MULTIPLY = frozenset({operator.mul, torch.mul, "mul"})
_MEAN = frozenset({torch.mean, "mean"})
_POWER = frozenset({operator.pow, torch.pow, "pow"})
_SQUARE = frozenset({torch.square, "square"})
_RSQRT = frozenset({torch.rsqrt, "rsqrt"})
_CASTS = frozenset({"to", "float", "half", "bfloat16", "type", "type_as"})
_LAYER = frozenset({F.layer_norm, torch.layer_norm})
_RMS = frozenset({F.rms_norm, torch.rms_norm})
# What ``.data`` is in a graph: a function of torch's, or an attribute.
_DATA = ("_get_data_attr", "data")


@dataclass(frozen=True)
class Norm:
    """A norm of the rows of ``x [*, K]``.

    Attributes:
        kind: as ``kernels/gpu/norm.py`` calls it.
        nodes: that compute it.
    """

    kind: str
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    eps: float
    nodes: frozenset[fx.Node] = field(repr=False)


def norm_of(h: Any) -> Norm | str | None:
    """The norm that a node is the result of; why no kernel computes it, if it is another norm; or
    None."""
    if tensor_of(h) is None:
        return None
    norm = _one_call(h) if h.target in _LAYER | _RMS else _spelled_out(h)
    return (_misfit(norm, h) or norm) if isinstance(norm, Norm) else norm


def _misfit(norm: Norm, h: fx.Node) -> str:
    """Why a kernel cannot read its operands as they are, rows and vectors that are there; or empty."""
    x, result = tensor_of(norm.x), tensor_of(h)
    if x is None or result is None or x.shape != result.shape or x.dim() < 2:
        return "the norm is not of rows of a matrix"
    if norm.kind != "rms, rounded" and result.dtype != x.dtype:
        return "the norm's result has another dtype than its input"
    if not {x.dtype, result.dtype} <= set(DTYPES):
        return f"the norm is in {x.dtype}"
    vectors: list[Any] = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
    for each in vectors:
        if not isinstance(each, fx.Node) or each.op != "placeholder":
            return "the norm's weight or bias is computed in the graph"
        if shape_of(each) != (x.shape[-1],):
            return "the norm's weight or bias is no vector of its K"
    return ""


def _one_call(h: Any) -> Norm | str:
    is_rms = h.target in _RMS
    names = "input normalized_shape weight eps" if is_rms else "input normalized_shape weight bias eps"
    given = dict(zip(names.split(), h.args, strict=False)) | h.kwargs
    weight, bias, eps = (given.get(name) for name in ("weight", "bias", "eps"))
    if weight is None:
        return "the norm has no weight"
    if len(given["normalized_shape"]) != 1:
        return "the norm is over several dimensions"
    if eps is None:
        eps = torch.finfo(torch.float32).eps if is_rms else 1e-5
    kind = "rms" if is_rms else "layer" if bias is None else "layer, bias"
    vectors = _below_data(weight), _below_data(bias)
    return Norm(kind, given["input"], *vectors, eps, frozenset({h, weight, bias}) - {None, *vectors})


def _spelled_out(h: Any) -> Norm | str | None:
    product = _without_cast(h)
    if product is not h and _calls(product, _CASTS):
        return None if norm_of(product) is None else "the norm is rounded twice"
    reason = None
    for weight, scaled in _factors(product):
        n, vector = _without_cast(scaled), _below_data(_without_cast(weight))
        for x32, rstd in _factors(n):
            x, found = _without_cast(x32), _mean_square(rstd)
            kind = _kind(h, scaled, vector, weight)
            if not isinstance(found, _MeanSquare):
                reason = reason or found
            elif _without_cast(found.x32) is not x:
                reason = "the norm divides by the mean square of another value"
            elif kind is None:
                reason = "the norm is rounded at another place than in the kernels"
            else:
                nodes = {h, product, weight, scaled, n, x32, rstd, *found.nodes} - {x, vector}
                return Norm(kind, x, vector, None, found.eps, frozenset(nodes))
    return reason


def _kind(h: Any, scaled: Any, vector: Any, weight: Any) -> str | None:
    """When the product is rounded; None: in neither of the ways that the kernels know."""
    result, factor, parameter, as_multiplied = (
        node.meta["example_value"].dtype for node in (h, scaled, vector, weight)
    )
    if result == factor == parameter == as_multiplied:
        return "rms, rounded"
    in_fp32 = factor == torch.float32 and torch.promote_types(factor, as_multiplied) == torch.float32
    return "rms" if in_fp32 else None


@dataclass(frozen=True)
class _MeanSquare:
    x32: fx.Node
    eps: float
    nodes: frozenset[fx.Node]


def _mean_square(rstd: Any) -> _MeanSquare | str | None:
    """``rsqrt(mean(x32 ** 2) + eps)``, of the last dimension; why it is another; None: no ``rsqrt``."""
    if not _calls(rstd, _RSQRT):
        return None
    total: Any = rstd.args[0]
    if not (_calls(total, _ADD) and len(total.args) == 2 and isinstance(total.args[1], float)):
        return "the norm adds no number eps to its mean square"
    mean, eps = total.args
    square = _operand_of_mean(mean)
    if square is None:
        return "the norm's mean is not over the last dimension"
    if not (_calls(square, _SQUARE) or (_calls(square, _POWER) and square.args[1] == 2)):
        return "the norm's mean is not of squares"
    value = tensor_of(square.args[0])
    if value is None or value.dtype != torch.float32:
        return "the norm's mean square is not in fp32"
    return _MeanSquare(square.args[0], eps, frozenset({total, mean, square, square.args[0]}))


def _operand_of_mean(mean: Any) -> Any:
    """What a node is the mean of, along its last dimension, which is kept; or None."""
    if not _calls(mean, _MEAN):
        return None
    given = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | mean.kwargs
    is_last = given.get("dim") in (-1, (-1,), [-1])
    return given["input"] if is_last and given.get("keepdim") else None


def _factors(product: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The two tensors of a product, both ways round."""
    if _calls(product, _MULTIPLY) and len(product.args) == 2:
        left, right = product.args
        if tensor_of(left) is not None and tensor_of(right) is not None:
            yield left, right
            yield right, left


def _without_cast(node: Any) -> Any:
    """What a node casts, or the node; of two casts the first rounds."""
    is_cast = _calls(node, _CASTS) and shape_of(node.args[0]) == shape_of(node) is not None
    return node.args[0] if is_cast else node


def _below_data(node: Any) -> Any:
    """The tensor whose ``.data`` a node reads, or the node."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return node
    attribute = node.args[1] if node.target is getattr else getattr(node.target, "__name__", "")
    return node.args[0] if attribute in _DATA else node


def _calls(node: Any, targets: Collection[Any]) -> bool:
    is_call = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return is_call and node.target in targets
