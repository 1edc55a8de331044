"""Outline: equal layers become one sub-graph that is called many times.

Before::

    a0 = norm(x0, g0);  y0 = linear(a0, w0);  x1 = x0 + y0
    a1 = norm(x1, g1);  y1 = linear(a1, w1);  x2 = x1 + y1         ... thirty times

After::

    x1 = invoke_subgraph(body, x0, g0, w0)[0]
    x2 = invoke_subgraph(body, x1, g1, w1)[0]                      ...

Inductor compiles the body once, so that the time of a compile hardly grows with the number of layers.
What repeats is found in the list of calls, whatever the architecture: a run of calls in which each is
like the one a period before. Each period is cut into pieces at the calls that write to memory. These
stay where they are, since inside a body Inductor would copy what they write to. A period begins where
the fewest values pass from one to the next.
"""

import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.mutation import Memory

LEAST_COPIES = 3
LEAST_CALLS = 8  # of a period and of a piece: a call of a body costs some microseconds
PERIODS = 64  # how many distances between like calls are tried

BODY = "the graph is a body of another one"
NOTHING = "no run of calls, with the same sizes, repeats three times"
UNLIKE = "like calls read their values in other ways"
SHARES = "a result shares memory with an operand or with another result"
NO_TENSOR = "a value that is no tensor would leave the body"
CONSTANT = "a constant is made in it, which Inductor would lose in a body"


@dataclass(frozen=True)
class Repeat:
    """A run of calls: from ``start`` on, ``length`` calls, each like the one ``period`` before."""

    start: int
    period: int
    length: int

    @property
    def saved(self) -> int:
        """How many calls are like an earlier one."""
        return (self.length // self.period - 1) * self.period


@dataclass(frozen=True)
class Copy:
    """One of several equal runs of calls.

    Attributes:
        calls: in order.
        operands: the values from outside, in the order in which the calls first read them.
        form: what it computes, with calls and operands by their positions: equal in all copies.
    """

    calls: list[fx.Node]
    operands: list[fx.Node]
    form: str


def outline(graph: fx.Graph, context: Context) -> Result:
    """Outlines the longest repeat of a graph; changed: how many calls of bodies it writes."""
    result = Result()
    if graph is not context.root:
        result.refuse(BODY)
        return result
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    repeat = longest_repeat(list(map(_kind, calls)))
    if repeat is None:
        result.refuse(NOTHING)
        return result
    memory = context.memory_now()
    bodies = []
    for copies in _pieces(calls, repeat, memory):
        body, reason = _body_of(copies, memory)
        result.refuse(reason, len(copies)) if body is None else bodies.append(body)
    for body in bodies:
        module = _module(graph, body)
        values = [each.meta["example_value"] for each in body.copies[0].operands]
        if context.makes_constants(module, values):
            result.refuse(CONSTANT, len(body.copies))
            continue
        _write(graph, body, module, context)
        result.changed += len(body.copies)
    return result


# --- What repeats -------------------------------------------------------------------------------


def _kind(node: fx.Node) -> str:
    """What a call has in common with those like it: all but which values it reads."""
    arguments = fx.map_arg((node.args, node.kwargs), lambda value: None)
    return f"{node.op} {node.target} {arguments} {_value(node)}"


def _value(node: fx.Node) -> str:
    return _described(node.meta.get("example_value"))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided and not value.is_nested else ""
        return f"{type(value).__name__} {tuple(value.shape)} {strides} {value.dtype} {value.device}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_described, value))})"
    return f"{type(value).__name__} {value}"


def longest_repeat(kinds: Sequence[str]) -> Repeat | None:
    """The one that saves the most calls, of the shortest period; None without one."""
    places = defaultdict(list)
    for place, kind in enumerate(kinds):
        places[kind].append(place)
    distances = Counter(
        after - before for each in places.values() for before, after in itertools.pairwise(each)
    )
    likely = (period for period, _ in distances.most_common(PERIODS) if period >= LEAST_CALLS)
    found = (repeat for period in likely for repeat in _repeats(kinds, period))
    return max(found, key=lambda each: (each.saved, -each.period), default=None)


def _repeats(kinds: Sequence[str], period: int) -> Iterator[Repeat]:
    start = 0
    for place in range(len(kinds) - period + 1):
        if place + period < len(kinds) and kinds[place] == kinds[place + period]:
            continue
        if place - start + period >= LEAST_COPIES * period:
            yield Repeat(start, period, place - start + period)
        start = place + 1


# --- Where it is cut ----------------------------------------------------------------------------


def _pieces(calls: list[fx.Node], repeat: Repeat, memory: Memory) -> Iterator[list[list[fx.Node]]]:
    """The copies of each piece of a period."""
    period = repeat.period
    writes = [memory.writes(call) for call in calls]
    start = min(_starts(repeat, writes), key=lambda start: _crossing(calls, start + period))
    count = (repeat.start + repeat.length - start) // period
    cuts = [-1, *(place for place in range(period) if writes[start + place]), period]
    for before, after in itertools.pairwise(cuts):
        first, length = start + before + 1, after - before - 1
        if length >= LEAST_CALLS:
            firsts = range(first, first + count * period, period)
            yield [calls[each : each + length] for each in firsts]


def _starts(repeat: Repeat, writes: list[bool]) -> list[int]:
    """Where a period may begin: anywhere, or behind a call that writes."""
    spare = repeat.length - LEAST_COPIES * repeat.period
    places = range(repeat.start, repeat.start + min(repeat.period, spare + 1))
    behind = [place for place in places if place and writes[place - 1]]
    return behind or list(places)


def _crossing(calls: list[fx.Node], place: int) -> int:
    """How many values of the calls before a place are read at it or behind."""
    behind = set(calls[place:])
    return sum(any(user in behind for user in call.users) for call in calls[:place])


def _copy(calls: list[fx.Node]) -> Copy:
    places = {call: f"call {place}" for place, call in enumerate(calls)}
    operands: dict[fx.Node, str] = {}

    def place(value: fx.Node) -> str:
        if value in places:
            return places[value]
        return operands.setdefault(value, f"operand {len(operands)}")

    form = [str(fx.map_arg((call.args, call.kwargs), place)) + _value(call) for call in calls]
    return Copy(calls, list(operands), str(form + list(map(_value, operands))))


# --- The body and its calls ---------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """Copies that one body can stand for, and which of its results are read outside."""

    copies: list[Copy]
    leaving: list[int]


def _body_of(pieces: list[list[fx.Node]], memory: Memory) -> tuple[Body | None, str]:
    """A body of the copies that are equal; or None, and why there is none."""
    views = {place for calls in pieces for place in _views_that_leave(calls, memory)}
    bodies = ([call for place, call in enumerate(calls) if place not in views] for calls in pieces)
    copies = [_copy(calls) for calls in bodies]
    form, count = Counter(copy.form for copy in copies).most_common(1)[0]
    if count < LEAST_COPIES:
        return None, UNLIKE
    equal = [copy for copy in copies if copy.form == form]
    leaving = sorted({place for copy in equal for place in _leaving(copy.calls)})
    reason = _reason(equal, leaving, memory)
    return (None, reason) if reason else (Body(equal, leaving), "")


def _leaving(calls: list[fx.Node]) -> list[int]:
    """Which results are read outside."""
    inside = set(calls)
    return [place for place, call in enumerate(calls) if not inside.issuperset(call.users)]


def _views_that_leave(calls: list[fx.Node], memory: Memory) -> Iterator[int]:
    """Views of values from outside that are read outside: these stay there."""
    inside = set(calls)
    leaving = set(_leaving(calls))
    for place, call in enumerate(calls):
        given = call.all_input_nodes
        if place in leaving and inside.isdisjoint(given) and any(memory.share(call, x) for x in given):
            inside.discard(call)
            yield place


def _reason(copies: list[Copy], leaving: list[int], memory: Memory) -> str:
    """Why these cannot be calls of a body, or empty."""
    for copy in copies:
        results = [copy.calls[place] for place in leaving]
        if not all(isinstance(each.meta.get("example_value"), Tensor) for each in results):
            return NO_TENSOR
        others = [*copy.operands, *results]
        if any(memory.share(each, other) for each in results for other in others if each is not other):
            return SHARES
    return ""


def _unused_name(gm: fx.GraphModule) -> str:
    taken = (f"outlined_{number}" for number in range(len(gm._modules) + 1))
    return next(name for name in taken if not hasattr(gm, name))


def _write(graph: fx.Graph, body: Body, module: fx.GraphModule, context: Context) -> None:
    gm = graph.owning_module
    assert gm is not None
    name = _unused_name(gm)
    gm.add_submodule(name, module)
    for copy in body.copies:
        _call(graph, name, copy, body.leaving, context)


def _module(root: fx.Graph, body: Body) -> fx.GraphModule:
    assert root.owning_module is not None
    copy, graph = body.copies[0], fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for number, operand in enumerate(copy.operands):
        values[operand] = graph.placeholder(f"operand_{number}")
        values[operand].meta = dict(operand.meta)
    for call in copy.calls:
        values[call] = graph.node_copy(call, values.__getitem__)
    graph.output(tuple(values[copy.calls[place]] for place in body.leaving))
    return fx.GraphModule(root.owning_module, graph)


def _call(graph: fx.Graph, name: str, copy: Copy, leaving: list[int], context: Context) -> None:
    results = [copy.calls[place] for place in leaving]
    inside = set(copy.calls)
    with graph.inserting_after(copy.calls[-1]):
        body = graph.get_attr(name)
    # What a copy before left is read by now from the call that took its place.
    operands = _copy(copy.calls).operands
    with graph.inserting_after(body):
        call = graph.call_function(context.subgraph_call, (body, name, *operands))
    call.meta["example_value"] = tuple(each.meta["example_value"] for each in results)
    last = call
    for position, each in enumerate(results):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, position))
        last.meta = dict(each.meta)
        each.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
    for each in reversed(copy.calls):
        graph.erase_node(each)
