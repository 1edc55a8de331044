"""Transforms: what ``torch.func`` computes inside a compiled function stays as it is.

Dynamo writes vmap, grad, vjp, jvp, jacrev, jacfwd and hessian as calls that enter and leave a level::

    _vmap_increment_nesting(5, "error")
    r = _add_batch_dim(x, 0, 1)
    y = F.linear(r, weight)
    out = _remove_batch_dim(y, 1, 5, 0)
    _vmap_decrement_nesting()

A value between them may be a wrapper of its level, which is gone when the backend runs. No call can be
inserted that reads it. The passes leave alone what has no value, so such values are forgotten here, and
linears there are refused by name. What comes out keeps its value.
"""

from collections.abc import Callable

from torch import Tensor, fx

from int8fx.passes.graph.scope import Scope
from int8fx.passes.graph.values import tensor_of

# The calls that enter a level, and for which transform; those that leave one have "decrement" instead.
LEVELS = {
    "_vmap_increment_nesting": "vmap",
    "_grad_increment_nesting": "grad",  # vjp, jacrev, hessian
    "_jvp_increment_nesting": "jvp",  # jacfwd, hessian
    "_func_increment_nesting": "functionalize",
}
_LEAVES = {name.replace("increment", "decrement") for name in LEVELS}
# The calls that wrap a value for a level, and unwrap one. They write to nothing.
WRAPS = frozenset(
    "_add_batch_dim _remove_batch_dim _wrap_for_grad _unwrap_for_grad _make_dual _unpack_dual "
    "_autograd_grad _set_tensor_requires_grad".split()
)
_REASON = "inside_transform"
# Where the value goes: its shape, dtype and memory may be asked for, and it may not be computed with.
INSIDE = "value_inside_transform"


def transform_of(node: fx.Node) -> str:
    """Inside which transforms of ``torch.func`` a node is, as a reason, or empty."""
    return node.meta.get(_REASON, "")


def leave_transforms(root: Scope, is_wrapper: Callable[[Tensor], bool]) -> int:
    """Marks every node inside a transform, and forgets its value; returns how many there are.

    Args:
        is_wrapper: whether a value belongs to a level.
    """
    return sum(_leave(scope, is_wrapper) for scope in root.walk())


def _leave(scope: Scope, is_wrapper: Callable[[Tensor], bool]) -> int:
    # A body is inside where the call that runs it is; scopes come before those below them.
    around = transform_of(scope.call) if scope.call is not None else ""
    levels: list[str] = []
    inside = []
    for node in scope.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name in LEVELS:
            levels.append(LEVELS[name])
        if levels or around:
            node.meta[_REASON] = around or f"inside torch.func: {' of '.join(levels)}"
            inside.append(node)
        if name in _LEAVES and levels:
            levels.pop()
    for node in inside:
        if not _comes_out(node, is_wrapper):
            node.meta[INSIDE] = node.meta.pop("example_value", None)
    return len(inside)


def _comes_out(node: fx.Node, is_wrapper: Callable[[Tensor], bool]) -> bool:
    value = tensor_of(node)
    read_outside = any(not transform_of(user) for user in node.users)
    return read_outside and (value is None or not is_wrapper(value))
