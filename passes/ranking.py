"""Whether the output of a linear is ranked, as a router's is::

    logits = F.linear(x, weight)
    scores = softmax(logits.float(), dim=-1)
    values, experts = torch.topk(scores, k, dim=-1)

Followed through what works element by element, or along the last dimension, and keeps the order of
dimensions. Nothing in the graph changes.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from int8fx.passes.values import rank_of, shape_of

RANKINGS: dict[Any, str] = {
    **{name: name for name in ("topk", "argmax", "argsort")},
    **{getattr(torch, name): name for name in ("topk", "argmax", "argsort")},
}
_NAMES = "softmax log_softmax sigmoid float to type_as clone contiguous add add_ mul div view reshape"
FOLLOWED: frozenset[Any] = frozenset(
    {
        *_NAMES.split(),
        *(torch.softmax, torch.log_softmax, torch.sigmoid, torch.add, torch.mul),
        *(F.softmax, F.log_softmax, F.sigmoid, F.softplus),
        *(operator.add, operator.iadd, operator.mul, operator.truediv),
    }
)


def ranked_by(node: fx.Node) -> str:
    """The call that ranks the last dimension of a node's value, or empty."""
    size, reached = _last(node), [node]
    seen = set(reached)
    while reached:
        for user in reached.pop().users:
            if user.target in RANKINGS and _dimension(user) in (-1, (rank_of(user.args[0]) or 0) - 1):
                return RANKINGS[user.target]
            if user.target in FOLLOWED and user not in seen and _last(user) == size:
                seen.add(user)
                reached.append(user)
    return ""


def _dimension(ranking: fx.Node) -> Any:
    """Along which one; -1 by default, but argmax's is the whole tensor."""
    position, default = (2, -1) if RANKINGS[ranking.target] == "topk" else (1, None)
    if RANKINGS[ranking.target] == "argsort":
        default = -1
    given = ranking.args[position] if len(ranking.args) > position else default
    return ranking.kwargs.get("dim", given)


def _last(node: fx.Node) -> Any:
    shape = shape_of(node)
    return shape[-1] if shape else None
