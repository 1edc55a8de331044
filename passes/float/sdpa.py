"""A call of ``F.scaled_dot_product_attention``, as the passes that rewrite it see it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from int8fx.passes.contract import Result
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import device_type, same_shape, shape_of

_ALL = slice(None)
_NEW_AXIS = (_ALL, _ALL, None, _ALL, _ALL)
DROPOUT = "it drops probabilities"
SHAPES = "its batches, or heads, are repeated in another way than by groups"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Attention:
    """One call, with keys and values before they are repeated for each head that shares them.

    Attributes:
        q: ``[B, H, M, D]``, k: ``[B, H / G, L, D]``, v: ``[B, H / G, L, DV]``.
        mask: what broadcasts to ``[B, H, M, L]``, or None.
        scale: None stands for ``1 / sqrt(D)``.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float | None

    @classmethod
    def of(cls, node: fx.Node, memory: Memory) -> "Attention | str":
        """Why it is another, for a call with dropout, or of other shapes."""
        given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
        q, k, v = (given[name] for name in ("query", "key", "value"))
        if not given.get("enable_gqa", False):
            k, v = (_before_repeat(each, node, memory) or each for each in (k, v))
        if given.get("dropout_p", 0.0):
            return DROPOUT
        if not _are_alike(*(shape_of(each) for each in (q, k, v, node))):
            return SHAPES
        causal, scale = given.get("is_causal", False), given.get("scale")
        return cls(node, q, k, v, given.get("attn_mask"), causal, scale)

    @property
    def device(self) -> str:
        return device_type(self.q)


def _are_alike(q: Any, k: Any, v: Any, y: Any) -> bool:
    """Whether the shapes are those above: no batch is repeated."""
    if any(shape is None or len(shape) != 4 for shape in (q, k, v)):
        return False
    (B, H, M, D), (_, heads, L, _), DV = q, k, v[3]
    fits = same_shape(k, (B, heads, L, D)) and same_shape(v, (B, heads, L, DV))
    return fits and same_shape(y, (B, H, M, DV)) and heads != 0 and H % heads == 0


def attentions(graph: fx.Graph, memory: Memory, result: Result) -> Iterator[Attention]:
    """Those of one graph, in order, each as it is once those before it are rewritten.

    Args:
        result: of a pass, which refuses the others.
    """
    for node in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        attention = Attention.of(node, memory)
        if isinstance(attention, Attention):
            yield attention
        else:
            result.refuse(attention)


def _before_repeat(node: Any, reader: fx.Node, memory: Memory) -> fx.Node | None:
    """``k`` of ``k[:, :, None].expand(B, heads, G, S, D).reshape(B, heads * G, S, D)``."""
    expanded = _argument_of(node, "reshape")
    inserted = _argument_of(expanded, "expand")
    k = _argument_of(inserted, "getitem")
    if k is None or inserted.args[1] != _NEW_AXIS or len(shape_of(k)) != 4:
        return None
    B, heads, S, D = shape_of(k)
    G = shape_of(expanded)[2]
    fits = shape_of(expanded) == (B, heads, G, S, D) and shape_of(node) == (B, heads * G, S, D)
    # The repeated key is a copy: neither it nor the key may change before it is read.
    return k if fits and not memory.written_between(node, reader, (k, node)) else None


def _argument_of(node: Any, name: str) -> Any:
    """The first argument of a call of the function or method of that name."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    called = getattr(node.target, "__name__", node.target)
    return node.args[0] if called == name else None
