"""Verify: the rewritten graphs are well formed, and every rewrite kept its shape, dtype and device."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from int8fx.passes.graph.scope import Scope


class RewriteError(AssertionError):
    """A pass broke the graph: a bug of int8fx, never of the model."""


@dataclass(frozen=True)
class Signature:
    """What the rest of the graph relies on in a node."""

    shape: tuple
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, node: fx.Node) -> "Signature":
        value = node.meta["example_value"]
        assert isinstance(value, Tensor)
        return cls(tuple(value.shape), value.dtype, value.device)


def verify(root: Scope, rewritten: list[tuple[fx.Node, Signature, Signature]]) -> None:
    """Raises:
    RewriteError: names the node and what it was, and is, as.
    """
    for node, before, after in rewritten:
        if before != after:
            raise RewriteError(f"{node.name} was {before} and became {after}")
    for scope in root.walk():
        scope.graph.lint()
        names = [node.name for node in scope.graph.find_nodes(op="placeholder")]
        if len(set(names)) != len(names):
            raise RewriteError(f"placeholders share a name: {names}")
