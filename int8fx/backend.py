"""``torch.compile(model, backend="llmint8")``."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from int8fx.compiler.report import collect_reports
from int8fx.compiler.watch import Watch
from int8fx.options import Options, inductor_patches
from int8fx.torch_private import check_torch, levels_left
from int8fx_autoload import after_import


def llmint8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """LLM.int8() as a backend of torch.compile.

    Args:
        gm: Dynamo's graph; it is not changed.
        example_inputs: its inputs, with parameters as real tensors.
        mode: with Inductor's meaning, see ``int8fx.options.MODES``.
        options: see ``int8fx.Options``.

    Returns:
        A callable with the graph's signature.

    Raises:
        ValueError: an option or the mode is unknown or out of range.
        RuntimeError: this torch release cannot be served.
    """
    check_torch()
    checked = Options.parse(options)
    patches = inductor_patches(mode, checked)

    from int8fx.compiler.pipeline import compile_graph

    watch.graphs += 1
    with levels_left(), collect_reports() as reports:
        compiled = compile_graph(gm, example_inputs, checked, patches)
    watch.compiled(reports)
    return compiled


def _watch_generation() -> None:
    importlib.import_module("int8fx.integrations.generation").install(llmint8)


watch = Watch(llmint8)
after_import("transformers.generation.utils", _watch_generation)
