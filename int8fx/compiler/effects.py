"""What a call of a graph does to the memory of its arguments, found out by running it.

The call runs on fake copies of its arguments, each with memory of its own, and every operator below it
is watched, as it declares which arguments it writes to. So ``torch._foreach_mul_([w], c)``,
``F.relu(w, True)``, ``F.embedding(i, w, max_norm=1.0)`` and whatever else torch has are seen alike, and
so is which arguments the result is a view of.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from int8fx import torch_private
from int8fx.passes.graph.mutation import Effect, declared_effect
from int8fx.passes.graph.transforms import INSIDE
from int8fx.weights.memory import AddressRange, merged

_UNKNOWN = object()


@dataclass(frozen=True)
class _Given:
    """Stands for a node among a call's arguments: equal calls of equal layers are run once."""

    position: int


class Effects:
    """The effect of each call of Dynamo's graphs, whose nodes know their values."""

    def __init__(self, fake_mode: Any) -> None:
        self._fake_mode = fake_mode if fake_mode is not None else torch_private.new_fake_mode()
        self._by_node: dict[fx.Node, tuple[tuple, dict, Effect]] = {}
        self._by_call: dict[tuple, Effect] = {}
        self._autocasts: dict[fx.Node, tuple[tuple, ...]] = {}

    def __call__(self, node: fx.Node) -> Effect:
        known = self._by_node.get(node)
        if known is None or known[:2] != (node.args, node.kwargs):
            known = self._by_node[node] = (node.args, node.kwargs, self._effect(node))
        return known[2]

    def _effect(self, node: fx.Node) -> Effect:
        inputs = node.all_input_nodes
        if not inputs:
            return Effect()
        values = [each.meta.get("example_value", each.meta.get(INSIDE, _UNKNOWN)) for each in inputs]
        if any(value is _UNKNOWN for value in values):
            return declared_effect(node, "its arguments are not known")
        if not any(isinstance(leaf, Tensor) for leaf in torch_private.leaves(values)):
            return Effect()
        try:
            given: dict[fx.Node, Any] = {each: _Given(i) for i, each in enumerate(inputs)}
            arguments = repr(fx.map_arg((node.args, node.kwargs), given.__getitem__))
            key = (
                node.op,
                node.target,
                arguments,
                str(torch_private.map_tensors(Tensor, _form, values)),
                self._autocasts_around(node),
            )
            if key not in self._by_call:
                self._by_call[key] = self._run(node, values)
            return self._by_call[key]
        # What fails here is any code of torch's, of another package's or of the model's.
        except Exception as error:
            doubt = f"{type(error).__name__}: {error}".partition("\n")[0]
            return declared_effect(node, doubt, _shared_in_trace(node, values))

    def _run(self, node: fx.Node, values: Sequence[Any]) -> Effect:
        if torch_private.is_higher_order(node.target):
            raise NotImplementedError("a higher-order operator without a graph")
        with contextlib.ExitStack() as around:
            for context in (self._fake_mode, torch.no_grad()):
                around.enter_context(context)
            around.enter_context(torch_private.ignoring_new_symbols(self._fake_mode))
            around.enter_context(torch_private.running_anew(self._fake_mode))
            # What a call asks of a size once more makes no condition on it: the call's own are there.
            around.enter_context(torch_private.without_guards(self._fake_mode))
            for arguments in self._autocasts_around(node):
                around.enter_context(torch.autocast(*arguments))
            copies = [
                torch_private.map_tensors(Tensor, torch_private.fake_copy, each) for each in values
            ]
            before = [torch_private.storages(each) for each in copies]
            by_node = dict(zip(node.all_input_nodes, copies, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), by_node.__getitem__)
            with torch_private.recording_writes() as written:
                if node.op == "call_method":
                    result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            after = [
                each | torch_private.storages(copy) for each, copy in zip(before, copies, strict=True)
            ]
        writes = frozenset(i for i, each in enumerate(before) if each & written)
        try:
            return Effect(writes, _shares(torch_private.storages(result), after))
        except NotImplementedError:  # what is batched by vmap does not tell of its storage
            return Effect(writes, frozenset(range(len(copies))))

    def _autocasts_around(self, node: fx.Node) -> tuple[tuple, ...]:
        """The arguments of the autocasts that a call is inside of, outermost first: under them it may
        take dtypes that it does not take alone."""
        if node not in self._autocasts:
            self._autocasts.update(torch_private.autocast_regions(node.graph))
        return self._autocasts[node]


def _shared_in_trace(node: fx.Node, values: Sequence[Any]) -> frozenset[int]:
    """The arguments that shared memory with the result when Dynamo ran it; all if that is unknown."""
    try:
        result = torch_private.storages(node.meta.get("example_value", node.meta.get(INSIDE)))
        given = [torch_private.storages(each) for each in values]
    except (KeyError, NotImplementedError, RuntimeError):
        return frozenset(range(len(values)))
    return frozenset(i for i, each in enumerate(given) if each & result)


def _form(tensor: Tensor) -> str:
    """What a call may ask a tensor without values for."""
    if torch_private.is_wrapper(tensor):
        inner, context = torch_private.held_by(tensor)
        return f"{type(tensor)} {context} {torch_private.map_tensors(Tensor, _form, inner)}"
    return f"{type(tensor)} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"


def _shares(result: frozenset[int], given: Sequence[frozenset[int]]) -> frozenset[int]:
    """The positions of what shares a storage with the result, or with another of the given."""
    shared = set()
    for position, storages in enumerate(given):
        others = result.union(*(each for i, each in enumerate(given) if i != position))
        if storages & others:
            shared.add(position)
    return frozenset(shared)


def overlapping(nodes: Sequence[fx.Node], values: Sequence[Any]) -> list[list[fx.Node]]:
    """Groups of placeholders whose tensors lie in one memory: views of one storage, or two storages of
    it, as two tensors made of one numpy array are."""
    return [group for _, group in merged(_storages(nodes, values)) if len(group) > 1]


def _storages(
    nodes: Iterable[fx.Node], values: Iterable[Any]
) -> Iterator[tuple[AddressRange, fx.Node]]:
    for node, value in zip(nodes, values, strict=True):
        if isinstance(value, Tensor) and not torch_private.is_fake(value):
            # Of a sparse tensor there is no storage.
            with contextlib.suppress(NotImplementedError):
                for storage in torch_private.untyped_storages(value):
                    if start := storage.data_ptr():
                        yield AddressRange(storage.device, start, start + storage.nbytes()), node
