"""Low-rank factors, as of an adapter: two linears with nothing between them but scales and casts::

    y = F.linear(dropout(F.linear(x, a)), b) * scale        a [r, K], b [N, r]

``r`` is small: at most ``RANK``, and at most half of K and of N. Where a function of each element is
between them, as in a bottleneck adapter, it is at most an eighth: ordinary MLPs are wide inside.

Nothing in the graph changes.
"""

from collections.abc import Mapping

from torch import fx

from int8fx.passes.linears.canonicalize import Candidate
from int8fx.passes.linears.ranking import Origin, name_of

RANK = 128

_KEEPS = frozenset(
    "to type type_as float half bfloat16 double _to_copy clone contiguous detach alias dropout "
    "view reshape flatten unflatten squeeze unsqueeze neg".split()
)
_FUNCTIONS = frozenset(
    "relu gelu silu tanh sigmoid leaky_relu elu relu_ silu_ tanh_ hardswish mish".split()
)
_SCALES = frozenset("mul mul_ imul __mul__ __rmul__ multiply div div_ truediv itruediv".split())

Shapes = Mapping[Candidate, tuple[int, ...]]


def is_low_rank(r: int, N: int, K: int, through_function: bool = False) -> bool:
    """Whether ``[N, r]`` and ``[r, K]`` are low-rank factors, or a bottleneck around a function."""
    return r <= RANK and r * (8 if through_function else 2) <= min(N, K)


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
        for value, changed in _scaled(first.node, origins).items():
            for second in readers.get(value, ()):
                if shapes[second][1:] == (r,) and is_low_rank(r, shapes[second][0], K, changed):
                    found |= {first.node, second.node}
    return frozenset(found)


def _scaled(node: fx.Node, origins: Mapping[fx.Node, Origin]) -> dict[fx.Node, bool]:
    """A value, what is it but for shape, dtype and a scale (False), and functions of these (True)."""
    changed, reached = {node: False}, [node]
    for value in reached:
        for user in value.users:
            others = (each for each in user.all_input_nodes if each is not value)
            fixed = all(origins[each] < Origin.ACTIVATIONS for each in others)
            name = name_of(user)
            if name in _KEEPS or name in _FUNCTIONS or (name in _SCALES and fixed):
                changed[user] = changed[value] or name in _FUNCTIONS
                reached.append(user)
    return changed
