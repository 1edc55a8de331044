"""Whether the output of a linear is ranked, or compared, as a router's is::

    scores = F.linear(x, weight).sigmoid()
    groups = scores.view(-1, 8, 32).topk(2, dim=-1)[0].sum(-1).topk(4, dim=-1)[1]
    ...
    experts = scores.masked_fill(~mask, 0.0).topk(8, dim=-1)[1]

Floating values are followed through whatever reads them. A call that makes integers of them ranks them:
``argmin``, ``multinomial``, ``bucketize``, and the indices of ``topk``, ``sort`` or ``max(dim)``. Where
only the values of ``topk`` or ``max`` are read, as in a pooling, these are followed on. A call that
makes booleans compares them. That counts where they decide on something else, see ``_decides``.

Four things end it:

- a product with a weight, a convolution, attention, an embedding: they mix everything;
- the third product of two activations: an indexer's queries and keys meet in one, and its heads are
  weighed in another;
- a skip connection, ``h + f(h)`` with a product in ``f``: behind it is the stream of the whole network;
- ``BUDGET`` values.

Nothing in the graph changes.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.passes.graph.scope import HIGHER_ORDER, Scope
from int8fx.passes.graph.values import shape_of, tensor_of

BUDGET = 512
PRODUCTS = 2
BEHIND = ", behind a product of two activations"

_MIXES = re.compile(r"conv(olution|_|\dd)|attention|attn|embedding|lstm|gru|rnn")
_PRODUCT = re.compile(
    r"linear|matmul|mm$|einsum|tensordot|multi_dot|^(inner|mv|dot|vdot|vecdot|addmv)$"
)
_ADDS = frozenset("add iadd add_ __add__ __radd__ __iadd__ sub isub sub_ addcmul lerp".split())
# These look at shapes and dtypes only, all but the first argument's in the second row.
_VALUE_FREE = re.compile(
    r"\w+_like$|new_\w+$|(size|dim|numel|shape|stride|zero_|fill_)$|_(assert|check)"
)
_OF_THE_FIRST = re.compile(r"\w+_as$|(to|type|expand)$")
_CASTS = frozenset("to type type_as long int _to_copy".split())
# Rounding does not turn these over: what is finite, and what is exactly zero.
_ROBUST = re.compile(r"is(nan|inf|finite|posinf|neginf|real)$|(bool|any|all|logical_\w+)$")
_EQUALITY = frozenset("eq ne __eq__ __ne__".split())
# Integers of other widths are quantised values.
_INDICES = (torch.int64, torch.int32)


class Origin(IntEnum):
    """What a node is computed from; of several, the largest."""

    CONSTANTS = 0
    WEIGHTS = 1
    ACTIVATIONS = 2


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls: ``topk`` of ``torch.topk`` and of ``aten.topk.default``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


class Rankings:
    """Where the values of one compile's graphs go.

    Args:
        root: the outermost graph.
        is_weight: whether a placeholder of it is a parameter or a buffer.
    """

    def __init__(self, root: Scope, is_weight: Callable[[fx.Node], bool]) -> None:
        self._scopes = {scope.graph: scope for scope in root.walk()}
        self._order: dict[fx.Node, int] = {}
        self.origins: dict[fx.Node, Origin] = {}
        self._skips: dict[fx.Node, bool] = {}
        for scope in root.walk():
            for position, node in enumerate(scope.graph.nodes):
                self._order[node] = position
                self.origins[node] = self._origin(node, scope, is_weight)

    def _origin(self, node: fx.Node, scope: Scope, is_weight: Callable[[fx.Node], bool]) -> Origin:
        if node.op != "placeholder":
            inputs = (self.origins[each] for each in node.all_input_nodes)
            return max(inputs, default=Origin.CONSTANTS)
        if scope.parent is not None:
            outer = scope.outer(node)
            return Origin.ACTIVATIONS if outer is None else self.origins[outer]
        if is_weight(node):
            return Origin.WEIGHTS
        return Origin.CONSTANTS if tensor_of(node) is None else Origin.ACTIVATIONS

    def ranked_by(self, linear: fx.Node) -> str:
        """What ranks or compares a node's values, as ``"ranked by topk"``; or empty."""
        products, since = {linear: 0}, {linear: -1}
        values, compared = deque([linear]), list[fx.Node]()
        while values and len(products) <= BUDGET:
            value = values.popleft()
            for user in value.users:
                passed = products[value] + _is_product(user)
                if self._order[user] <= since[value] or self._ends(user, value, passed):
                    continue
                for result in self._results(user, value):
                    what = _becomes(user, result)
                    if what == "indices":
                        return f"ranked by {name_of(user)}{BEHIND * bool(products[value])}"
                    if what == "mask":
                        compared.append(result)
                    elif what == "values" and result not in products:
                        products[result] = passed
                        # What is written to holds the values from then on.
                        since[result] = self._order[user] if result in user.all_input_nodes else -1
                        values.append(result)
        deciding = (mask for mask in compared if self._decides(mask, set(products)))
        mask = next(deciding, None)
        return "" if mask is None else f"compared by {name_of(mask)}"

    def _ends(self, user: fx.Node, value: fx.Node, products: int) -> bool:
        """Whether a value is followed no further than to this user of it."""
        if not _reads_values(user, value) or _MIXES.search(name_of(user)):
            return True
        if _is_product(user):
            return products > PRODUCTS or any(
                self.origins[operand] == Origin.WEIGHTS for operand in user.all_input_nodes
            )
        return self._is_skip(user)

    def _results(self, user: fx.Node, value: fx.Node) -> Iterator[fx.Node]:
        """The nodes that hold what ``user`` makes of a value."""
        scope = self._scopes[user.graph]
        if user.op == "output":
            yield from self._returned(scope, value)
        elif name_of(user) in HIGHER_ORDER:
            for child in scope.children:
                if child.call is user and not child.closed:
                    placeholders = child.graph.find_nodes(op="placeholder")
                    yield from (each for each in placeholders if child.outer(each) is value)
        elif isinstance(user.meta.get("example_value"), (tuple, list)):
            yield from (each for each in user.users if name_of(each) == "getitem" and each.users)
        else:
            yield user
            target = user.args[0] if user.args else None
            if _writes(user) and isinstance(target, fx.Node) and target is not value:
                yield target

    def _returned(self, scope: Scope, value: fx.Node) -> Iterator[fx.Node]:
        """What holds a result of a body where it is called."""
        if scope.call is None:
            return
        (output,) = scope.graph.find_nodes(op="output")
        results = output.args[0]
        if not isinstance(results, (tuple, list)):
            yield scope.call
            return
        positions = {position for position, result in enumerate(results) if result is value}
        for user in scope.call.users:
            if name_of(user) == "getitem" and user.args[1] in positions:
                yield user

    # --- skip connections ------------------------------------------------------------------------

    def _is_skip(self, node: fx.Node) -> bool:
        """Whether a node adds a value and what linears made of it, as ``h + f(h)``."""
        if node not in self._skips:
            self._skips[node] = name_of(node) in _ADDS and self._adds_its_own(node)
        return self._skips[node]

    def _adds_its_own(self, node: fx.Node) -> bool:
        operands = [each for each in node.all_input_nodes if self.origins[each] == Origin.ACTIVATIONS]
        operands = [each for each in operands if shape_of(each) == shape_of(node)]
        roots = [self._root(operand) for operand in operands]
        return any(
            self._is_made_of(operand, root)
            for root, own in zip(roots, operands, strict=True)
            for operand in operands
            if operand is not own
        )

    def _root(self, node: fx.Node) -> fx.Node:
        """Back through casts, scales and norms: whatever reads one activation, and is no product."""
        while not _is_product(node) and not _MIXES.search(name_of(node)):
            inputs = [each for each in node.all_input_nodes if self.origins[each] == Origin.ACTIVATIONS]
            if len(inputs) != 1:
                break
            (node,) = inputs
        return node

    def _is_made_of(self, node: fx.Node, root: fx.Node) -> bool:
        """Whether a node is computed from another, and a product is on the way."""
        reached, seen = [(node, False)], set[tuple[fx.Node, bool]]()
        while reached:
            current, crossed = reached.pop()
            if current is root and crossed:
                return True
            if (current, crossed) in seen or self._order[current] <= self._order[root]:
                continue
            seen.add((current, crossed))
            name = name_of(current)
            crossed |= _is_product(current) or name in HIGHER_ORDER or bool(_MIXES.search(name))
            reached += ((each, crossed) for each in current.all_input_nodes)
        return False

    # --- comparisons -----------------------------------------------------------------------------

    def _decides(self, mask: fx.Node, values: set[fx.Node]) -> bool:
        """Whether a mask does more than to choose among the values that it was computed from.

        ``where(x > 0, x, 0.1 * x)`` is a function of each x, and continuous as most are. A mask that
        leaves the graph, picks other values or steers control flow is a decision.
        """
        reached, seen = [mask], {mask}
        while reached and len(seen) <= BUDGET:
            current = reached.pop()
            for user in current.users:
                name = name_of(user)
                if user.op == "output" or name in ("cond", "while_loop", "item"):
                    return True
                if not _reads_values(user, current) or values & set(user.all_input_nodes):
                    continue
                results = [each for each in self._results(user, current) if each not in seen]
                others = (each for each in user.all_input_nodes if each not in seen)
                mixed = any(self.origins[each] > Origin.CONSTANTS for each in others)
                if mixed and any(_is_floating(result) for result in results):
                    return True
                seen.update(results)
                reached += results
        return False


def _is_product(node: fx.Node) -> bool:
    return bool(_PRODUCT.search(name_of(node)))


def _writes(node: fx.Node) -> bool:
    name = name_of(node)
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def _reads_values(user: fx.Node, value: fx.Node) -> bool:
    """Whether a call reads the contents of a tensor, and not its shape or its dtype alone."""
    name = name_of(user)
    if _OF_THE_FIRST.match(name) and user.args:
        return user.args[0] is value
    return not _VALUE_FREE.match(name)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _becomes(user: fx.Node, result: fx.Node) -> str:
    """``values``, ``indices`` or ``mask``: what a result of a call is, or empty: nothing to follow."""
    # Writing returns nothing, and a body's placeholder or a written buffer holds the values.
    value: Any = result.meta.get("example_value")
    if not isinstance(value, Tensor):
        return ""
    name = name_of(user)
    if _is_floating(result):
        return "indices" if _draws(user) else "values"
    if value.dtype in _INDICES:
        return "mask" if name in _CASTS else "indices"
    constant = name in _EQUALITY and len(user.all_input_nodes) < 2
    if value.dtype != torch.bool or _ROBUST.match(name) or constant:
        return ""
    return "mask"


def _draws(user: fx.Node) -> bool:
    """Whether a call draws a choice, and says it in floats."""
    name = name_of(user)
    hard = len(user.args) > 2 and user.args[2]
    return name == "bernoulli" or (name == "gumbel_softmax" and bool(user.kwargs.get("hard", hard)))
