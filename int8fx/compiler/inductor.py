"""The last steps of a compile: Inductor on the rewritten graph, behind the swap of its weights."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.weight_inputs import behind, finish_inputs
from int8fx.kernels import table
from int8fx.kernels.gpu.tuning import tuning
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.table import decompositions
from int8fx.passes.int8.unlist_linears import unlist_linears
from int8fx.weights.distributed import local
from int8fx.weights.tensor import QuantizedWeight

WHOLE_ROW = 8192  # elements that Inductor reduces in one launch, however few rows there are


def codegen(compilation: Compilation, patches: dict[str, Any]) -> Callable[..., Any]:
    """AOTAutograd and Inductor on the rewritten graph, behind the swap of its weights.

    Args:
        patches: Inductor's configuration.
    """
    if torch_private.writes_cpp_wrapper(patches):
        for scope in compilation.root.walk():
            unlist_linears(scope.graph, compilation.fake_mode)
    swap, kept = finish_inputs(compilation)
    examples = [compilation.inputs[position] for position in kept]
    examples += map(torch_private.as_static_input, swap.packed(compilation.inputs))
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
    if not compilation.needs_autograd:
        compiled = torch_private.below_autograd(compiled)
    return behind(swap, compiled)


def _whole_rows(compilation: Compilation) -> dict[str, Any]:
    """What keeps the quantisation of a row in the kernel that computes it, on a GPU.

    Inductor splits a reduction where rows are few and longer than WHOLE_ROW, as in front of
    Llama-3-8B's down_proj: a row's absmax would be two launches, and what it scales a third. The
    setting is for a whole graph, so one with such a row pays for it in its other long reductions.
    """
    nodes = (node for scope in compilation.root.walk() for node in scope.graph.nodes)
    operators = table.with_whole_rows()
    rows = [node.args[0].meta["example_value"] for node in nodes if node.target in operators]
    return {"split_reductions": False} if any(x.shape[-1] > WHOLE_ROW for x in rows) else {}


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


PACKAGE = Path(__file__).parents[1]
SUFFIXES = (".py", ".cpp", ".h")


def sources(package: Path = PACKAGE) -> list[Path]:
    """Every source of this package, in all of its folders: the Python and the C++ ones."""
    # A walk does not enter symbolic links, and two folders of a checkout are some.
    folders = (package, package / "passes", package / "kernels")
    files = {file for folder in folders for file in folder.resolve().rglob("*")}
    return sorted(file for file in files if file.suffix in SUFFIXES)


@functools.cache
def cache_identity(package: Path = PACKAGE) -> str:
    """A hash of this package's sources: part of the key of every compile cache below us."""
    return f"int8fx-{_digest(source.read_bytes() for source in sources(package))}"


def _schemes_identity(compilation: Compilation) -> str:
    """The same of the schemes that a graph uses, as far as they are defined elsewhere."""
    chosen = {
        (choice.scheme.name, choice.weight_format.name): choice
        for choice in compilation.choices.values()
    }
    ours = set(sources())
    foreign = [_sources_of(choice) - ours for choice in chosen.values()]
    files = sorted(set().union(*foreign))
    return f"-schemes-{_digest(source.read_bytes() for source in files)}" if files else ""


def _sources_of(choice: Choice) -> set[Path]:
    """The files that define what a scheme computes; one typed into a session has none."""
    scheme, kept = choice.scheme, choice.weight_format
    functions = [*vars(scheme).values(), *scheme.decompositions.values(), *vars(kept).values()]
    found = (inspect.getsourcefile(each) for each in functions if inspect.isfunction(each))
    paths = {Path(name).resolve() for name in found if name is not None}
    return {path for path in paths if path.is_file()}


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]
