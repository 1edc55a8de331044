"""Capture: a copy of Dynamo's graph, with the module path of each weight."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.options import Options
from int8fx.passes.graph.scope import scopes


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
