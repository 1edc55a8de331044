"""What one compile knows: the graph, its weights and what became of each linear."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from int8fx import torch_private
from int8fx.effects import Effects, overlapping
from int8fx.kernels.scheme import Choice
from int8fx.options import Options
from int8fx.passes.canonicalize import Candidate
from int8fx.passes.decision import Decision
from int8fx.passes.lower import Product
from int8fx.passes.mutation import Memory
from int8fx.passes.scope import Scope, scopes
from int8fx.passes.verify import Signature
from int8fx.weights import STORE, PackedWeight, Slot, WeightStore, WeightSwap


@dataclass
class Compilation:
    """What the steps hand to each other."""

    original: fx.GraphModule
    root: Scope
    inputs: list[Any]
    options: Options
    placeholders: list[fx.Node]
    paths: dict[fx.Node, str]
    tensors: dict[fx.Node, Tensor]
    store: WeightStore = STORE
    found: list[Candidate] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    accepted: list[Candidate] = field(default_factory=list)
    choices: dict[Candidate, Choice] = field(default_factory=dict)
    products: dict[Candidate, Product] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    packed: list[PackedWeight] = field(default_factory=list)
    packed_nodes: dict[tuple[fx.Node, str, str], list[fx.Node]] = field(default_factory=dict)
    signatures: list[tuple[fx.Node, Signature, Signature]] = field(default_factory=list)
    quantizations: int = 0
    swap: WeightSwap = field(init=False)
    _memory: Memory | None = None

    @functools.cached_property
    def fake_mode(self) -> Any:
        values = [node.meta.get("example_value") for node in self.placeholders]
        return torch_private.fake_mode_of(values)

    @functools.cached_property
    def effects(self) -> Effects:
        return Effects(self.fake_mode)

    def memory(self) -> Memory:
        """Which values of the graphs, as they are now, share memory, and where it is written to."""
        # No pass adds a write to graphs without one.
        if self._memory is None or self._memory.is_written:
            groups = overlapping(self.placeholders, self.inputs)
            self._memory = Memory(self.root, self.effects, groups)
        return self._memory

    @property
    def needs_autograd(self) -> bool:
        """Whether a backward pass may come: Dynamo guards on what decides it."""
        return self._enables_grad or (
            torch.is_grad_enabled()
            and any(isinstance(value, Tensor) and value.requires_grad for value in self.inputs)
        )

    @property
    def records_gradients(self) -> bool:
        """Whether the graphs do, or a part of them."""
        return torch.is_grad_enabled() or self._enables_grad

    @functools.cached_property
    def _enables_grad(self) -> bool:
        """Whether a part of the graphs records gradients, whatever their caller does."""
        graphs = (scope.graph for scope in self.root.walk())
        return not torch.is_inference_mode_enabled() and any(map(torch_private.enables_grad, graphs))

    def add_input(self, name: str, value: Tensor) -> fx.Node:
        """A placeholder behind those that are there, for a weight's packed form."""
        last = self.root.graph.find_nodes(op="placeholder")[-1]
        with self.root.graph.inserting_after(last):
            node = self.root.graph.placeholder(name)
        torch_private.mark_as_weight(node)
        with self.fake_mode:
            node.meta["example_value"] = torch.empty(
                value.shape, dtype=value.dtype, device=value.device
            )
        return node


def capture(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Compilation:
    """Copies the graph and finds out which of its inputs are weights, and of which modules."""
    copied = torch_private.copy_graph_module(gm)
    placeholders = copied.graph.find_nodes(op="placeholder")
    paths, tensors = {}, {}
    for node, value in zip(placeholders, inputs, strict=True):
        path = _tensor_path(torch_private.source_name(node))
        if path is not None and isinstance(value, Tensor) and not torch_private.is_fake(value):
            paths[node], tensors[node] = path, value
    return Compilation(gm, scopes(copied), list(inputs), options, placeholders, paths, tensors)


_MODULE = re.compile(r"(?:\._modules\['([^']+)'\])|(?:\._(?:parameters|buffers)\['([^']+)'\]$)")


def _tensor_path(source: str | None) -> str | None:
    """``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``; None for no weight."""
    if source is None or not re.search(r"\._(?:parameters|buffers)\['[^']+'\]$", source):
        return None
    return ".".join(module or tensor for module, tensor in _MODULE.findall(source))


def owner_path(weight: fx.Node) -> str:
    """The module path of whatever holds a weight, which need not be a parameter or a buffer."""
    source = torch_private.source_name(weight) or weight.name
    return ".".join(module for module, _ in _MODULE.findall(source))
