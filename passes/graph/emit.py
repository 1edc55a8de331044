"""Inserting calls into a graph of Dynamo's kind, with the value that each would have.

Dynamo annotates every node with ``meta["example_value"]``, a fake tensor. Calls inserted here get
theirs by running on the fake values of their arguments, so an impossible call fails at compile time
and later passes and ``verify`` can ask for shapes and dtypes.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from int8fx.passes.graph.arguments import arranged
from int8fx.passes.graph.weight_expression import Step


@dataclass(frozen=True)
class Emitter:
    """Inserts before the graph's current insertion point (``with graph.inserting_before(node)``)."""

    graph: fx.Graph
    fake_mode: Any
    origin: fx.Node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._annotate(self.graph.call_function(target, args, kwargs), target)

    def named(self, target: Callable[..., Any], **values: Any) -> fx.Node:
        """A call whose arguments are given by their names."""
        args, kwargs = arranged(target, values)
        return self.call(target, *args, **kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        def run(value: Any, *rest: Any) -> Any:
            return getattr(value, name)(*rest)

        return self._annotate(self.graph.call_method(name, args), run)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def steps(self, node: fx.Node, steps: Iterable[Step]) -> fx.Node:
        for step in steps:
            node = self.method(step.target, node, *step.args)
        return node

    def _annotate(self, node: fx.Node, run: Callable[..., Any]) -> fx.Node:
        values, named = fx.map_arg(
            (node.args, node.kwargs), lambda argument: argument.meta["example_value"]
        )
        # Autocast is no part of the graph's meaning here: our calls state their dtypes.
        with self.fake_mode, torch.no_grad():
            node.meta["example_value"] = run(*values, **named)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.origin.meta:
                node.meta[key] = self.origin.meta[key]
        return node
