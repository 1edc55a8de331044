"""``torch.compile(model, backend="llmint8")``."""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any
from weakref import WeakSet

from torch import Tensor, fx, nn

from int8fx.compiler.report import collect_reports
from int8fx.compiler.watch import Watch
from int8fx.errors import UserError
from int8fx.near import warn_of_unused
from int8fx.options import Options, inductor_patches
from int8fx.torch_private import check_torch, compiled_modules, levels_left, raised_as_it_is
from int8fx_autoload import after_import


def llmint8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | str | PathLike[str] | None = None,
) -> Callable[..., Any]:
    """LLM.int8() as a backend of torch.compile.

    Args:
        gm: Dynamo's graph; it is not changed.
        example_inputs: its inputs, with parameters as real tensors.
        mode: with Inductor's meaning, see ``int8fx.options.MODES``.
        options: see ``int8fx.Options``, or the file of them that ``int8fx suggest --out`` wrote.

    Returns:
        A callable with the graph's signature.

    Raises:
        TypeError: called with a model; torch.compile takes that.
        ValueError: an option or the mode is unknown or out of range. torch shows a backend its options
            at the first call and not before; ``int8fx.Options.parse(options)`` checks them at once.
        RuntimeError: this torch release cannot be served.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)
        >>> compiled = torch.compile(model, backend="llmint8", options={"threshold": 3.0})
        >>> compiled(torch.ones(2, 64)).shape
        torch.Size([2, 64])
    """
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(
            f"llmint8: given {type(gm).__name__}; allowed: a graph that Dynamo traced, which "
            'torch.compile(model, backend="llmint8") makes'
        )
    check_torch()
    try:
        checked = Options.parse(options)
        patches = inductor_patches(mode, checked)
    except (ValueError, OSError) as error:
        raise raised_as_it_is(error) from None

    from int8fx.compiler.pipeline import compile_graph

    watch.graphs += 1
    try:
        with levels_left(), collect_reports() as reports:
            compiled = compile_graph(gm, example_inputs, checked, patches)
    except UserError as error:
        raise raised_as_it_is(error) from None
    watch.compiled(reports)
    if not watch.linears:
        _hint_of_bitsandbytes()
    if any(report.unused for report in reports):
        _warn_of_unused(checked, example_inputs)
    return compiled


_warned: WeakSet[nn.Module] = WeakSet()
_hinted: WeakSet[nn.Module] = WeakSet()


def _warn_of_unused(options: Options, inputs: Sequence[Any]) -> None:
    """Once for each model: a graph may be a part of it, so the patterns are held against the whole."""
    weights = {id(each) for each in inputs if isinstance(each, Tensor)}
    for module in compiled_modules(llmint8):
        if module not in _warned and not weights.isdisjoint(map(id, module.parameters())):
            _warned.add(module)
            warn_of_unused(options, module, stacklevel=2)


def _hint_of_bitsandbytes() -> None:
    """Once for each model whose linears the backend never sees, as Dynamo breaks the graph at them."""
    theirs = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if theirs is None or "int8fx.integrations.bitsandbytes" in sys.modules:
        return
    for module in compiled_modules(llmint8):
        linears = [each for each in module.modules() if isinstance(each, theirs.Linear8bitLt)]
        if linears and module not in _hinted:
            _hinted.add(module)
            warnings.warn(
                f"{len(linears)} linears of {type(module).__name__} are bitsandbytes' Linear8bitLt, at "
                "which the graph breaks: import int8fx.integrations.bitsandbytes before the model is "
                "first called, and int8fx takes their int8 weights over",
                UserWarning,
                stacklevel=2,
            )


def _watch_generation() -> None:
    importlib.import_module("int8fx.integrations.generation").install(llmint8)


def _watch_exports() -> None:
    importlib.import_module("int8fx.integrations.export").install(llmint8)


watch = Watch(llmint8)
after_import("transformers.generation.utils", _watch_generation)
after_import("torch.export._trace", _watch_exports)
