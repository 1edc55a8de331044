"""A model's forward with a static KV cache, as graphs of linears in int8 that AOTInductor compiles.

Dynamo traces the model as ``torch.compile`` does, and the passes rewrite the graph. What Dynamo takes
from the model and from the cache stays an input of the graph: each is a tensor with a name here, and a
place in a file or in memory where the artefact runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from int8fx import torch_private
from int8fx.ahead.artefact import TOKENS, Buffer, Graph
from int8fx.ahead.operators import operator_calls, operators_of
from int8fx.bench.contenders import cache_argument, empty_cache
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.pipeline import decide, report, rewrite_what_was_accepted
from int8fx.compiler.weight_inputs import finish_inputs
from int8fx.errors import UserError
from int8fx.kernels.schemes.table import decompositions
from int8fx.options import Options, inductor_patches
from int8fx.weights.store import STORE

EXAMPLE = 64  # tokens of the prefill that is traced: attention of many rows, as most prompts are

# As safetensors spells them.
DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bool: "BOOL",
    torch.bfloat16: "BF16",
}


@dataclass
class Tensors:
    """The inputs of programs, by name: one name for one tensor.

    Attributes:
        weights: what stays as it is.
        buffers: of the cache.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def name_of_buffer(self, tensor: Tensor) -> str | None:
        return next((name for name, each in self.buffers.items() if each is tensor), None)

    def name_of_weight(self, tensor: Tensor, wanted: str) -> str:
        """Raises:
        UserError: it has no plain memory, or no dtype of safetensors.
        """
        kind = type(tensor).__name__
        if tensor.dtype not in DTYPES or not tensor.is_contiguous() or kind not in PLAIN:
            raise UserError(f"{wanted}: a {kind} of {tensor.dtype} is not in plain memory")
        taken = (name for name, each in self.weights.items() if _same(each, tensor))
        name = next(taken, None) or self._unused(wanted)
        self.weights[name] = tensor
        return name

    def _unused(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.weights or name in self.buffers or name == TOKENS:
            number += 1
            name = f"{wanted}.{number}"
        return name


PLAIN = ("Tensor", "Parameter", "Buffer")


def _same(left: Tensor, right: Tensor) -> bool:
    form = [(each.data_ptr(), each.shape, each.dtype) for each in (left, right)]
    return form[0] == form[1]


@dataclass(frozen=True)
class Program:
    """A compiled graph.

    Attributes:
        graph: how it is called.
        library: what AOTInductor wrote.
        operators: of int8fx, that it calls: ``(name, overload, schema)``.
    """

    graph: Graph
    library: Path
    operators: list[tuple[str, str, str]]


def static_cache(model: Any, context: int) -> tuple[StaticCache, dict[str, Tensor]]:
    """A cache for one text of ``context`` tokens, and its tensors by name.

    Raises:
        UserError: the model keeps something else than keys and values of all tokens.
    """
    cache = empty_cache(model, context, 1, next(model.parameters()).device)
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer})
    if others:
        raise UserError(
            f"its cache has layers of {', '.join(others)}: int8fx compile takes models whose layers "
            "all keep the keys and values of every token"
        )
    names = ("keys", "values", "cumulative_length")
    return cache, {
        f"cache.{number}.{name}": getattr(layer, name)
        for number, layer in enumerate(cache.layers)
        for name in names
    }


def described(buffers: Mapping[str, Tensor]) -> dict[str, Buffer]:
    return {
        name: Buffer(DTYPES[each.dtype], tuple(each.shape), counts=each.dim() == 0)
        for name, each in buffers.items()
    }


class Tracer:
    """Traces and compiles a model's forward.

    Attributes:
        tensors: the inputs of what was traced so far.
    """

    def __init__(self, model: Any, context: int, options: Options, folder: Path) -> None:
        """
        Args:
            context: how many tokens the cache holds.
            folder: where AOTInductor writes.
        """
        self._model, self._context, self._options, self._folder = model, context, options, folder
        self._cache, buffers = static_cache(model, context)
        self.tensors = Tensors(buffers=buffers)

    def prefill(self) -> Program:
        """Of any number of tokens from 2 up to one less than the cache holds."""
        length = min(EXAMPLE, self._context - 1)
        tokens = torch.zeros(1, length, dtype=torch.long)
        torch_private.mark_dynamic(tokens, 1, 2, self._context - 1)
        return self._trace("prefill", tokens)

    def decode(self) -> Program:
        """Of one token."""
        return self._trace("decode", torch.zeros(1, 1, dtype=torch.long))

    def _trace(self, name: str, tokens: Tensor) -> Program:
        made: list[Program] = []

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            made.append(self._compile(name, tokens, gm, inputs))
            return gm.forward

        def forward(tokens: Tensor) -> Tensor:
            cached = {cache_argument(self._model): self._cache}
            return self._model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cached).logits

        try:
            with torch.no_grad():
                torch_private.compile_apart(forward, backend, fullgraph=True)(tokens)
        except torch_private.not_one_graph() as error:
            raise _refusal(name, error) from error
        self._cache.reset()
        return made[0]

    def _compile(self, name: str, tokens: Tensor, gm: fx.GraphModule, inputs: Sequence[Any]) -> Program:
        compilation = decide(gm, inputs, self._options, STORE)
        compilation.cpp_wrapper = True
        with torch_private.without_guards(compilation.fake_mode):
            rewrite_what_was_accepted(compilation)
        if not compilation.accepted:
            raise UserError(f"no linear of this model becomes int8: {_reasons(compilation)}")
        swap, left = finish_inputs(compilation)
        values = [inputs[position] for position in left] + swap.packed(inputs)
        graph = compilation.root.gm
        nodes = graph.graph.find_nodes(op="placeholder")
        named = {
            node.name: self._name(compilation, node, value, tokens)
            for node, value in zip(nodes, values, strict=True)
            if isinstance(value, Tensor)
        }
        torch_private.sizes_as_calls(graph)
        nodes = graph.graph.find_nodes(op="placeholder")
        report(compilation)
        files = torch_private.compile_ahead(
            graph,
            [node.meta["example_value"] for node in nodes],
            inductor_patches(None, self._options),
            decompositions(),
            self._folder,
            name,
        )
        calls = operator_calls(files)
        library = next(path for path in files if path.suffix == ".so")
        return Program(Graph([named[node.name] for node in nodes], calls), library, operators_of(calls))

    def _name(self, compilation: Compilation, node: fx.Node, value: Tensor, tokens: Tensor) -> str:
        if value is tokens:
            return TOKENS
        if buffer := self.tensors.name_of_buffer(value):
            return buffer
        wanted = compilation.paths.get(node) or node.name
        if compilation.memory().writers(node):
            raise UserError(f"the model writes to {wanted}, which is no part of a static cache")
        return self.tensors.name_of_weight(value, wanted)


def _refusal(name: str, error: Exception) -> UserError:
    """Why Dynamo has no graph; what the backend raised comes inside of an error of Dynamo's."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, UserError):
        return inner
    what = "is no single graph" if inner is None else "cannot be compiled"
    reason = str(inner or error).strip().partition("\n")[0]
    return UserError(f"the {name} of this model {what}: {reason}")


def _reasons(compilation: Compilation) -> str:
    reasons = {each.reason for each in compilation.decisions if not each.accepted}
    return "; ".join(sorted(reasons)) or "it has none"
