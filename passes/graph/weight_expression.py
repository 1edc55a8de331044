"""Weights: a parameter or a buffer, seen through views and casts with constant arguments.

    w.t()     w.T.half()     in_proj_weight[0:64]     w.unsqueeze(0).expand(8, -1, -1)

are all *weight expressions*. An expression is evaluated once, on the real tensor, when the weight is
quantised; nothing of it stays in the graph. Anything computed otherwise is not a weight.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.passes.graph.scope import Scope

_METHODS = frozenset(
    "t transpose permute contiguous detach to half float bfloat16 view reshape flatten unflatten "
    "squeeze unsqueeze expand broadcast_to repeat narrow chunk split swapaxes swapdims movedim select "
    "unbind clone type __getitem__".split()
)

_FUNCTIONS: frozenset[Callable] = frozenset(
    {
        operator.getitem,
        torch.t,
        torch.transpose,
        torch.permute,
        torch.reshape,
        torch.flatten,
        torch.unflatten,
        torch.squeeze,
        torch.unsqueeze,
        torch.broadcast_to,
        torch.narrow,
        torch.chunk,
        torch.split,
        torch.swapaxes,
        torch.swapdims,
        torch.movedim,
        torch.select,
        torch.unbind,
        torch.clone,
        # .T and .mT, as torch 2.14 traces them; 2.13 traces a getattr
        torch.ops.aten.numpy_T,
        torch.ops.aten.mT,
    }
)
_ATTRIBUTES = frozenset({"T", "mT", "data"})


@dataclass(frozen=True)
class Step:
    """One view or cast: an FX call whose first argument is the value before it."""

    op: str
    target: Any
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, value: Any) -> Any:
        kwargs = dict(self.kwargs)
        if self.op == "call_method":
            return getattr(value, self.target)(*self.args, **kwargs)
        return self.target(value, *self.args, **kwargs)

    def without_device(self) -> "Step":
        """The same without a move to a device."""
        if self.target != "to":
            return self
        args = tuple(each for each in self.args if not isinstance(each, (str, torch.device)))
        kwargs = tuple((name, value) for name, value in self.kwargs if name != "device")
        # ``to`` wants one argument at least.
        return Step(self.op, self.target, args, kwargs or (("copy", False),))

    def __str__(self) -> str:
        name = self.target if isinstance(self.target, str) else self.target.__name__
        return f".{name}({', '.join(map(repr, (*self.args, *self.kwargs)))})"


@dataclass(frozen=True)
class WeightExpression:
    """``steps`` applied to the tensor behind ``placeholder``, a node of the outermost graph."""

    placeholder: fx.Node
    steps: tuple[Step, ...]

    def meta(self) -> Tensor:
        """The weight without contents, from what Dynamo knows of the placeholder."""
        value = self.placeholder.meta["example_value"]
        return self.on_meta(
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        )

    def on_meta(self, tensor: Tensor) -> Tensor:
        """``evaluate`` of a meta tensor, which has no contents to move to a device."""
        value: Any = tensor
        for step in self.steps:
            value = step.without_device()(value)
        return value

    def then(self, *steps: Step) -> "WeightExpression":
        return WeightExpression(self.placeholder, (*self.steps, *steps))

    def evaluate(self, tensor: Tensor) -> Tensor:
        value: Any = tensor
        for step in self.steps:
            value = step(value)
        return value

    @property
    def recipe(self) -> str:
        """The steps as text: equal recipes of one tensor give equal weights."""
        return "".join(map(str, self.steps))


TRANSPOSE = Step("call_method", "transpose", (0, 1), ())


def resolve(node: Any, scope: Scope, is_weight: Callable[[fx.Node], bool]) -> WeightExpression | None:
    """The weight expression that a node of a scope computes, or None.

    Args:
        is_weight: whether a placeholder of the outermost graph is a parameter or a buffer.
    """
    steps: list[Step] = []
    current: Scope | None = scope
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            if current is None or current.parent is None:
                return WeightExpression(node, tuple(reversed(steps))) if is_weight(node) else None
            node, current = current.outer(node), current.parent
            continue
        step = _step(node)
        if step is None:
            return None
        steps.append(step)
        node = node.args[0]
    return None


def computed_of_weights(node: Any, scope: Scope, path_of: Callable[[fx.Node], str | None]) -> str:
    """``cat, mul of q.weight, k.weight``: what computes a node of parameters and buffers, and of which;
    empty where anything else has a part in it, and for constants."""
    functions: dict[str, None] = {}
    paths: dict[str, None] = {}
    seen: set[fx.Node] = set()
    ahead = [(node, scope)]
    while ahead:
        node, scope = ahead.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and scope.parent is not None:
            ahead.append((scope.outer(node), scope.parent))
        elif node.op == "placeholder":
            if (path := path_of(node)) is None:
                return ""
            paths[path] = None
        elif not is_view_or_cast(node):
            name = node.args[1] if node.target is getattr else node.target
            functions[getattr(name, "__name__", str(name))] = None
        ahead += [(each, scope) for each in reversed(node.all_input_nodes)]
    return f"{', '.join(functions)} of {', '.join(paths)}" if functions and paths else ""


def _step(node: fx.Node) -> Step | None:
    if not node.args or not is_view_or_cast(node):
        return None
    rest = (*node.args[1:], *node.kwargs.values())
    if any(_has_node(argument) for argument in rest):
        return None
    return Step(node.op, node.target, tuple(node.args[1:]), tuple(sorted(node.kwargs.items())))


def is_view_or_cast(node: fx.Node) -> bool:
    """Whether a node only looks at its first argument in another shape or dtype."""
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.target in _FUNCTIONS


def _has_node(argument: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return bool(found)


_ADD_A_BATCH = frozenset(
    {
        *("expand", "unsqueeze", "expand_as", "repeat", "broadcast_to", "__getitem__"),
        *(torch.unsqueeze, torch.broadcast_to, operator.getitem),
    }
)


def without_broadcast(node: Any) -> Any:
    """The ``[K, N]`` node below an ``expand`` to ``[B, K, N]``, or the node itself.

    Every slice of the result is the same matrix, so a batched product with it is a linear map.
    """
    base = node
    while _adds_a_batch(base):
        base = base.args[0]
    shape = _shape(base)
    return base if shape is not None and len(shape) == 2 else node


def _adds_a_batch(node: Any) -> bool:
    """Whether a call repeats matrices, or makes a batch of one, and leaves each as it is."""
    if not isinstance(node, fx.Node) or node.target not in _ADD_A_BATCH or not node.args:
        return False
    if not isinstance(node.args[0], fx.Node) or not _only_new_dimensions(node):
        return False
    before, after = _shape(node.args[0]), _shape(node)
    return before is not None and after is not None and before[-2:] == after[-2:]


def _only_new_dimensions(node: fx.Node) -> bool:
    """Of an index: whether it is as ``w[None]`` and selects nothing."""
    if node.target is not operator.getitem and node.target != "__getitem__":
        return True
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _shape(node: fx.Node) -> tuple | None:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else None
