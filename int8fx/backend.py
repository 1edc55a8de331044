"""``torch.compile(model, backend="llmint8")``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from int8fx.options import Options, inductor_patches
from int8fx.torch_private import check_torch, levels_left


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

    from int8fx.pipeline import compile_graph

    with levels_left():
        return compile_graph(gm, example_inputs, checked, patches)
