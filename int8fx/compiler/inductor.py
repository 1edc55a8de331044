"""The last steps of a compile: Inductor on the rewritten graph, called with its packed weights."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.compiled_graph import CompiledGraph
from int8fx.compiler.identity import cache_identity, digest, sources
from int8fx.compiler.swap import WeightSwap
from int8fx.compiler.weight_inputs import finish_inputs
from int8fx.kernels import table
from int8fx.kernels.gpu.tuning import tuning
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import decompositions
from int8fx.passes.graph.arguments import argument
from int8fx.passes.graph.values import shape_of
from int8fx.weights.distributed import local
from int8fx.weights.tensor import QuantizedWeight

WHOLE_ROW = 8192  # elements that Inductor reduces in one launch, however few rows there are


def call_inductor(compilation: Compilation, patches: dict[str, Any]) -> Callable[..., Any]:
    """AOTAutograd and Inductor on the rewritten graph, called with its packed weights.

    Args:
        patches: Inductor's configuration.
    """
    swap, kept_inputs = finish_inputs(compilation)
    examples = [compilation.inputs[position] for position in kept_inputs]
    examples += map(torch_private.as_static_input, swap.packed(compilation.inputs))
    return _compiled(compilation, swap, examples, patches)


def call_inductor_later(
    compilation: Compilation, patches: dict[str, Any]
) -> Callable[[], Callable[..., Any]]:
    """The same as a function that is called when Dynamo is done, once or more often."""
    swap, _ = finish_inputs(compilation)
    placeholders = compilation.root.graph.find_nodes(op="placeholder")
    examples = [node.meta["example_value"] for node in placeholders]

    def compile_now() -> Callable[..., Any]:
        with torch_private.apart_from_dynamo(compilation.fake_mode):
            return _compiled(compilation, swap, examples, patches)

    return compile_now


def _compiled(
    compilation: Compilation, swap: WeightSwap, examples: list[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    with tuning(torch_private.tunes(patches)):
        compiled = torch_private.compile_with_inductor(
            compilation.root.gm,
            examples,
            _whole_rows(compilation) | patches,
            decompositions(),
            cache_identity() + _schemes_identity(compilation) + _int8_shards(examples),
        )
    if not compilation.slots:
        return compiled
    return CompiledGraph(
        swap, compiled, compilation.devices, below_autograd=not compilation.needs_autograd
    )


def _whole_rows(compilation: Compilation) -> dict[str, Any]:
    """What keeps the quantisation of a row in the kernel that computes it, on a GPU.

    Inductor splits a reduction where rows are few and longer than WHOLE_ROW, as in front of
    Llama-3-8B's down_proj: a row's absmax would be two launches, and what it scales a third. The
    setting is for a whole graph, so one with such a row pays for it in its other long reductions.
    """
    # All graphs: ``outline`` put most of the calls into bodies of its own.
    graphs = (
        module.graph for module in compilation.root.gm.modules() if isinstance(module, GraphModule)
    )
    nodes = (node for graph in graphs for node in graph.nodes)
    operators = table.with_whole_rows()
    rows = [shape_of(argument(node, "x"))[-1] for node in nodes if node.target in operators]
    return {"split_reductions": False} if any(K > WHOLE_ROW for K in rows) else {}


def _int8_shards(examples: Sequence[Any]) -> str:
    """Which inputs are distributed int8 weights: AOTAutograd's cache takes all DTensors of a shape and
    placement for the same, whatever they hold."""
    shards = [
        str(position)
        for position, example in enumerate(examples)
        if isinstance(example, Tensor)
        and not isinstance(example, QuantizedWeight)
        and isinstance(local(example), QuantizedWeight)
    ]
    return "-int8-shards-" + ",".join(shards) if shards else ""


def _schemes_identity(compilation: Compilation) -> str:
    """The same of the schemes that a graph uses, as far as they are defined elsewhere."""
    chosen = {
        (choice.scheme.name, choice.weight_format.name): choice
        for choice in compilation.choices.values()
    }
    ours = set(sources())
    foreign = [_sources_of(choice) - ours for choice in chosen.values()]
    files = sorted(set().union(*foreign))
    return f"-schemes-{digest(source.read_bytes() for source in files)}" if files else ""


def _sources_of(choice: Choice) -> set[Path]:
    """The files that define what a scheme computes; one typed into a session has none."""
    scheme, weight_format = choice.scheme, choice.weight_format
    functions = [*vars(scheme).values(), *scheme.decompositions.values(), *vars(weight_format).values()]
    found = (inspect.getsourcefile(each) for each in functions if inspect.isfunction(each))
    paths = {Path(name).resolve() for name in found if name is not None}
    return {path for path in paths if path.is_file()}
