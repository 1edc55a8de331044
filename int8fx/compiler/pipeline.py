"""One compile, as named steps: from Dynamo's graph to a callable."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from int8fx import torch_private
from int8fx.compiler.background import CompiledLater, refusal
from int8fx.compiler.capture import capture
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.compiled_graph import CompiledGraph
from int8fx.compiler.context import context_of
from int8fx.compiler.decide import canonicalize, select
from int8fx.compiler.foreign import replace_bitsandbytes
from int8fx.compiler.graphs import GraphDump, readable
from int8fx.compiler.inductor import call_inductor, call_inductor_later
from int8fx.compiler.release import release
from int8fx.compiler.report import Report, publish
from int8fx.compiler.weight_inputs import finish_inputs, quantize_weights
from int8fx.kernels import table
from int8fx.options import Options
from int8fx.passes import order
from int8fx.passes.graph.verify import verify
from int8fx.passes.outcome import Outcome
from int8fx.weights.changes import watch as watch_changes
from int8fx.weights.store import STORE, WeightStore

log = logging.getLogger(__name__)


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any]
) -> Callable[..., Any]:
    """A callable with the graph's signature, its linears in int8.

    Args:
        gm: as Dynamo gives it to a backend; it is left as it is.
        inputs: the graph's inputs, parameters among them as real tensors.
        patches: Inductor's configuration.
    """
    compilation = decide(gm, inputs, options, STORE)
    compilation.cpp_wrapper = torch_private.writes_cpp_wrapper(patches)
    rewrite_what_was_accepted(compilation)
    if options.background and not _compiles_at_once(compilation):
        report(compilation)
        eager = rewrite_graph(gm, inputs, options, STORE)
        conditions = functools.partial(torch_private.size_conditions, compilation.fake_mode)
        return CompiledLater(eager, call_inductor_later(compilation, patches), conditions)
    compiled = call_inductor(compilation, patches)
    if options.release_weights:
        compilation.swap.mark_quantized(release(compilation))
    report(compilation)
    return compiled


def _compiles_at_once(compilation: Compilation) -> bool:
    """Whether the option ``background`` cannot be; the log says why."""
    reason = refusal(compilation)
    if reason:
        log.info("a graph is not compiled in the background: %s", reason)
    return bool(reason)


def rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    store: WeightStore,
    watch: Callable[[Compilation], None] = lambda compilation: None,
    runner: Callable[[fx.GraphModule], Callable[..., Any]] = lambda gm: gm,
) -> Callable[..., Any]:
    """The rewritten graph as it is before Inductor, to be run operator by operator.

    Args:
        store: keeps the packed weights: one that is not the process's own forgets them with it.
        watch: sees the compilation after ``select`` and may wrap products, see ``observe.py``.
        runner: how the rewritten graph is run.
    """
    compilation = decide(gm, inputs, options, store)
    watch(compilation)
    rewrite(compilation, for_inductor=False)
    swap, _ = finish_inputs(compilation)
    return CompiledGraph(swap, runner(compilation.root.gm), compilation.devices)


def outcomes_of(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, store: WeightStore
) -> list[Outcome]:
    """What the passes would do to a graph if it were compiled, by trying them on a copy of it."""
    compilation = decide(gm, inputs, options, store)
    compilation.cpp_wrapper = torch_private.writes_cpp_wrapper(dict(options.inductor))
    rewrite_what_was_accepted(compilation)
    return compilation.outcomes


def decide(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, store: WeightStore
) -> Compilation:
    """Every linear of a copy of the graph, and what becomes of it."""
    compilation = capture(gm, inputs, options)
    compilation.store = store
    canonicalize(compilation)
    select(compilation)
    return compilation


def rewrite_what_was_accepted(compilation: Compilation) -> None:
    """The passes, for Inductor; a graph without an int8 linear stays as it is."""
    folder = compilation.options.dump_graphs
    dump = None if folder is None else GraphDump(folder, compilation.root.gm)
    if replace_bitsandbytes(compilation) or compilation.accepted:
        rewrite(compilation, for_inductor=True, dump=dump)


def rewrite(compilation: Compilation, for_inductor: bool, dump: GraphDump | None = None) -> None:
    """Runs the passes of ``passes/order.py``, with the weights quantised.

    Args:
        for_inductor: whether Inductor compiles the graphs; else they run operator by operator.
        dump: writes the graph before and after each.
    """
    watch_changes()
    quantize_weights(compilation)
    context = context_of(compilation, for_inductor)
    for number, each in enumerate(order.PASSES, 1):
        outcome = each.run(compilation.root, context)
        log.debug("%s", outcome)
        compilation.outcomes.append(outcome)
        if dump is not None:
            dump.passed(number, each.name)
    compilation.quantizations = context.quantizations
    verify(compilation.root, context.signatures)


def report(compilation: Compilation) -> None:
    """Hands the decisions to whoever asked for them (``collect_reports``) and to the log."""
    made = Report(
        decisions=tuple(compilation.decisions),
        kernel=table.describe(compilation.devices),
        original=readable(compilation.original),
        graph=readable(compilation.root.gm),
        quantizations=compilation.quantizations,
        passes=tuple(compilation.outcomes),
        float_bytes=sum(weight.float_bytes for weight in compilation.packed),
        int8_bytes=sum(weight.nbytes for weight in compilation.packed),
        unused=compilation.options.unused([each.path for each in compilation.decisions]),
    )
    log.info("%s", made)
    publish(made)
