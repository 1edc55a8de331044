"""What one compile knows: the graph, its weights and what became of each linear."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from int8fx import torch_private
from int8fx.compiler.effects import Effects, overlapping
from int8fx.compiler.swap import Slot, WeightSwap
from int8fx.kernels.schemes.scheme import Choice
from int8fx.options import Options
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.scope import Scope
from int8fx.passes.linears.candidate import Candidate, Product
from int8fx.passes.linears.decision import Decision
from int8fx.passes.outcome import Outcome
from int8fx.weights.store import STORE, PackedWeight, WeightStore


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
    cpp_wrapper: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    quantizations: int = 0
    swap: WeightSwap = field(init=False)

    @functools.cached_property
    def fake_mode(self) -> Any:
        values = [node.meta.get("example_value") for node in self.placeholders]
        return torch_private.fake_mode_of(values)

    @functools.cached_property
    def effects(self) -> Effects:
        return Effects(self.fake_mode)

    def memory(self) -> Memory:
        """Which values of the graphs, as they are now, share memory, and where it is written to."""
        return Memory(self.root, self.effects, overlapping(self.placeholders, self.inputs))

    @property
    def devices(self) -> frozenset[str]:
        """The device types of the inputs. No other's kernel is asked for: that may be building it."""
        return frozenset(each.device.type for each in self.inputs if isinstance(each, Tensor))

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
