"""Low-rank factors, as of an adapter: two linears with nothing between them but scales and casts::

    y = F.linear(dropout(F.linear(x, a)), b) * scale        a [r, K], b [N, r]

``r`` is small: at most ``RANK``, and at most half of K and of N. Nothing in the graph changes.
"""

from collections.abc import Mapping

from torch import fx

from int8fx.passes.canonicalize import Candidate
from int8fx.passes.ranking import Origin, name_of

RANK = 128

_KEEPS = frozenset(
    "to type type_as float half bfloat16 double _to_copy clone contiguous detach alias dropout "
    "view reshape flatten unflatten squeeze unsqueeze neg".split()
)
_SCALES = frozenset("mul mul_ imul __mul__ __rmul__ multiply div div_ truediv itruediv".split())

Shapes = Mapping[Candidate, tuple[int, ...]]


def is_low_rank(r: int, N: int, K: int) -> bool:
    """Whether ``[N, r] @ [r, K]`` is a matrix of low rank."""
    return r <= RANK and 2 * r <= min(N, K)


def factors(shapes: Shapes, origins: Mapping[fx.Node, Origin]) -> frozenset[fx.Node]:
    """The nodes of linears that are a factor.

    Args:
        shapes: ``(N, K)`` of the weight of each candidate.
        origins: what each node of the graphs is computed from.
    """
    readers: dict[fx.Node | None, list[Candidate]] = {}
    for candidate in shapes:
        readers.setdefault(candidate.x, []).append(candidate)
    found: set[fx.Node] = set()
    for first, shape in shapes.items():
        if len(shape) != 2 or shape[0] > RANK:
            continue
        r, K = shape
        for value in _scaled(first.node, origins):
            for second in readers.get(value, ()):
                if shapes[second][1:] == (r,) and is_low_rank(r, shapes[second][0], K):
                    found |= {first.node, second.node}
    return frozenset(found)


def _scaled(node: fx.Node, origins: Mapping[fx.Node, Origin]) -> list[fx.Node]:
    """A value, and what is it but for shape, dtype and a scale."""
    reached = [node]
    for value in reached:
        for user in value.users:
            others = (each for each in user.all_input_nodes if each is not value)
            fixed = all(origins[each] < Origin.ACTIVATIONS for each in others)
            name = name_of(user)
            if name in _KEEPS or (name in _SCALES and fixed):
                reached.append(user)
    return reached
