"""One compile, as ten named steps: from Dynamo's graph to a callable."""

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from int8fx import torch_private
from int8fx.changes import watch as watch_changes
from int8fx.codegen import behind, codegen, finish_inputs
from int8fx.compilation import Compilation, capture, owner_path
from int8fx.kernels import table
from int8fx.kernels.scheme import Choice
from int8fx.kernels.schemes.int8 import ABSMAX_VECTOR, OF_BITSANDBYTES
from int8fx.kernels.schemes.table import DEFAULT, SCHEMES, quantizers
from int8fx.options import Options
from int8fx.passes import bitsandbytes_nodes
from int8fx.passes.attend import attend_few, attend_many
from int8fx.passes.canonicalize import Candidate, candidates
from int8fx.passes.compute_once import compute_once
from int8fx.passes.decision import Decision
from int8fx.passes.experts import serve_experts
from int8fx.passes.fuse_epilogue import fuse_epilogue
from int8fx.passes.fuse_norms import fuse_norms
from int8fx.passes.fuse_prologue import fuse_prologue
from int8fx.passes.fuse_sums import fuse_sums
from int8fx.passes.group_heads import group_heads
from int8fx.passes.join_linears import join_linears
from int8fx.passes.low_rank import factors
from int8fx.passes.lower import lower, lower_matmul
from int8fx.passes.mutation import Memory
from int8fx.passes.one_row import one_row
from int8fx.passes.ranking import Rankings
from int8fx.passes.select import (
    REQUIRES_GRAD,
    WRITTEN,
    Selection,
    module_path,
    only_reason,
    refusal,
    shape_of_weight,
    skip_reason,
)
from int8fx.passes.transforms import leave_transforms
from int8fx.passes.verify import Signature, verify
from int8fx.passes.weight_expression import WeightExpression
from int8fx.quantized_weight import Int8Weight
from int8fx.release import release
from int8fx.report import Report, publish
from int8fx.weights import Slot, WeightStore, weight_reason

log = logging.getLogger(__name__)

# What a product of two activations is: a scale per token, and no outliers.
OF_ACTIVATIONS = ABSMAX_VECTOR.name


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any]
) -> Callable[..., Any]:
    """A callable with the graph's signature, its linears in int8.

    Args:
        gm: as Dynamo gives it to a backend; it is left as it is.
        inputs: the graph's inputs, parameters among them as real tensors.
        patches: Inductor's configuration.
    """
    compilation = capture(gm, inputs, options)
    canonicalize(compilation)
    select(compilation)
    if replace_bitsandbytes(compilation) or compilation.accepted:
        rewrite(compilation)
        speed_up_float(compilation)
        verify(compilation.root, compilation.signatures)
    compiled = codegen(compilation, patches)
    if options.release_weights:
        compilation.swap.replaced(release(compilation))
    report(compilation)
    return compiled


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
    compilation = capture(gm, inputs, options)
    compilation.store = store
    canonicalize(compilation)
    select(compilation)
    watch(compilation)
    rewrite(compilation)
    verify(compilation.root, compilation.signatures)
    swap, _ = finish_inputs(compilation)
    return behind(swap, runner(compilation.root.gm))


def rewrite(compilation: Compilation) -> None:
    """The steps that put int8 linears where ``select`` accepted them."""
    watch_changes()
    quantize_weights(compilation)
    lower_linears(compilation)
    share_quantizations(compilation)
    fold_biases(compilation)
    join_quantized_linears(compilation)
    serve_expert_linears(compilation)
    leave_sums(compilation)
    move_norms(compilation)


def canonicalize(compilation: Compilation) -> None:
    """Finds every linear and matmul, in one form whatever its spelling."""
    leave_transforms(compilation.root, torch_private.is_level_wrapper)
    compilation.found = candidates(
        compilation.root, compilation.paths.get, compilation.options.attention
    )


def select(compilation: Compilation) -> None:
    """Decides which are rewritten."""
    options = compilation.options
    rankings = Rankings(compilation.root, compilation.tensors.__contains__)
    shapes = {
        candidate: shape_of_weight(candidate.weight, compilation.tensors)
        for candidate in compilation.found
        if candidate.weight is not None
    }
    selection = Selection(
        tensors=compilation.tensors,
        paths=compilation.paths,
        skip=options.skip,
        only=options.only,
        skips_by_default=options.skips_by_default,
        kernel_reason=table.refusal,
        memory=compilation.memory(),
        records_gradients=compilation.records_gradients,
        weight_reason=functools.partial(_weight_reason, options),
        ranked_by=rankings.ranked_by,
        factors=factors(shapes, rankings.origins),
        attention=options.attention,
    )
    for candidate in compilation.found:
        reason = refusal(candidate, selection)
        dimensions = shapes.get(candidate, ())
        path = module_path(candidate, selection)
        choice = _choice(compilation, candidate, path)
        routed = candidate.routing is not None
        if not reason and routed and choice.scheme.experts is None:
            reason = f"scheme {choice.scheme.name!r} has no product for experts"
        decision = Decision(
            path=path,
            spelling=candidate.spelling,
            shape=(dimensions[-2], dimensions[-1]) if len(dimensions) in (2, 3) else None,
            accepted=not reason,
            reason=reason,
            scheme="" if reason else OF_ACTIVATIONS if candidate.weight is None else choice.scheme.name,
            experts=dimensions[0] if len(dimensions) == 3 else 0,
        )
        log.debug("%s", decision)
        compilation.decisions.append(decision)
        if not reason:
            compilation.accepted.append(candidate)
        if not reason and candidate.weight is not None:
            compilation.choices[candidate] = choice
            compilation.products[candidate] = choice.lower_experts if routed else choice.lower
    _warn_of_trainable(compilation.decisions)


def _choice(compilation: Compilation, candidate: Candidate, path: str) -> Choice:
    weight = candidate.weight and compilation.tensors.get(candidate.weight.placeholder)
    kept = weight.activation_options if isinstance(weight, Int8Weight) else None
    return compilation.options.choice(path, kept)


def _weight_reason(options: Options, path: str, tensor: Tensor, expression: WeightExpression) -> str:
    return weight_reason(tensor, expression, options.choice(path).weight_format)


def _warn_of_trainable(decisions: Sequence[Decision]) -> None:
    trainable = sum(decision.reason == REQUIRES_GRAD for decision in decisions)
    if trainable:
        warnings.warn(
            f"llmint8 left {trainable} linears in float, because their weights require grad: call "
            "the model under torch.no_grad(), or freeze it with model.requires_grad_(False)",
            UserWarning,
            stacklevel=2,
        )


def quantize_weights(compilation: Compilation) -> None:
    """Quantises each accepted weight, once, and makes its parts inputs of the graph."""
    for candidate in compilation.accepted:
        expression = candidate.weight
        if expression is None:
            continue
        key = _packed_key(compilation, candidate)
        if key in compilation.packed_nodes:
            continue
        kept = compilation.choices[candidate].weight_format
        tensor = compilation.tensors[expression.placeholder]
        packed = compilation.store.get(tensor, expression, kept)
        position = compilation.placeholders.index(expression.placeholder)
        # Two recipes of one weight are two packed weights.
        name = f"{expression.placeholder.name}{len(compilation.slots)}_"
        compilation.slots.append(Slot(position, expression, kept, isinstance(tensor, Int8Weight)))
        compilation.packed.append(packed)
        compilation.packed_nodes[key] = [
            compilation.add_input(f"{name}{part}", value)
            for part, value in zip(kept.parts, packed.tensors, strict=True)
        ]


def replace_bitsandbytes(compilation: Compilation) -> int:
    """Rewrites linears of bitsandbytes, whose weights are int8 already; returns how many."""
    graph, options = compilation.root.graph, compilation.options
    inputs = dict(zip(compilation.placeholders, compilation.inputs, strict=True))
    linears, found = bitsandbytes_nodes.find(graph), 0
    if linears:
        bitsandbytes_nodes.drop_rebinding(
            graph, lambda left, right: inputs[left].data_ptr() == inputs[right].data_ptr()
        )
    memory = compilation.memory()
    for linear in linears:
        path = owner_path(linear.weight)
        N, K = inputs[linear.weight].shape
        reason = skip_reason(path, options.skip) or only_reason(path, options.only)
        if memory.writers(linear.weight) or memory.writers(linear.scale):
            reason = reason or WRITTEN
        elif memory.written_between(linear.x, linear.quantization, linear.read):
            reason = reason or f"the graph writes to {linear.x.name} before it is quantised"
        scheme = "" if reason else DEFAULT
        compilation.decisions.append(Decision(path, "bitsandbytes", (N, K), not reason, reason, scheme))
        if reason:
            continue
        found += 1
        position = compilation.placeholders.index(linear.weight)
        expression = WeightExpression(linear.weight, ())
        packed = compilation.store.get(inputs[linear.weight], expression, OF_BITSANDBYTES)
        compilation.slots.append(Slot(position, expression, OF_BITSANDBYTES, False))
        compilation.packed.append(packed)
        w_packed = compilation.add_input(f"{linear.weight.name}_packed", packed.tensors[0])
        own = {"threshold": linear.threshold, "decomposition": "column"}
        choice = Choice(SCHEMES[DEFAULT], options.choice(path, own).settings)
        bitsandbytes_nodes.replace(linear, w_packed, choice.lower, compilation.fake_mode)
    return found


def _packed_key(compilation: Compilation, candidate: Candidate) -> tuple[fx.Node, str, str]:
    """Candidates with one key share one packed weight."""
    assert candidate.weight is not None
    kept = compilation.choices[candidate].weight_format
    return candidate.weight.placeholder, candidate.weight.recipe, kept.name


def lower_linears(compilation: Compilation) -> None:
    """Rewrites each accepted candidate into what its scheme computes."""
    rewritten: dict[fx.Node, fx.Node] = {}
    for candidate in compilation.accepted:
        before = Signature.of(candidate.node)
        # An operand may be a candidate that has just been rewritten.
        candidate.rebind(rewritten)
        if candidate.weight is None:
            y = lower_matmul(candidate, compilation.fake_mode)
        else:
            weight = compilation.packed_nodes[_packed_key(compilation, candidate)]
            product = compilation.products[candidate]
            y = lower(candidate, weight, product, compilation.fake_mode)
        rewritten[candidate.node] = y
        compilation.signatures.append((y, before, Signature.of(y)))


def share_quantizations(compilation: Compilation) -> None:
    """fuse_prologue on every graph."""
    memory = compilation.memory()  # a pass on one graph puts nothing into another
    for scope in compilation.root.walk():
        fuse_prologue(scope.graph, quantizers(), memory)


def fold_biases(compilation: Compilation) -> None:
    """fuse_epilogue on every graph."""
    memory = compilation.memory()
    for scope in compilation.root.walk():
        fuse_epilogue(scope.graph, memory)


def join_quantized_linears(compilation: Compilation) -> None:
    """join_linears on every graph; counts quantisations, which it may take away, before."""
    memory = compilation.memory()
    for scope in compilation.root.walk():
        for quantizer in quantizers():
            found = scope.graph.find_nodes(op="call_function", target=quantizer)
            compilation.quantizations += len(found)
        join_linears(scope.graph, compilation.fake_mode, table.joined, memory)


def serve_expert_linears(compilation: Compilation) -> None:
    """serve_experts on every graph."""
    for scope in compilation.root.walk():
        serve_experts(scope.graph, table.experts)


def leave_sums(compilation: Compilation) -> None:
    """fuse_sums on every graph."""
    for scope in compilation.root.walk():
        fuse_sums(scope.graph)


def move_norms(compilation: Compilation) -> None:
    """fuse_norms on every graph, where a kernel has an operator for it, which has no gradient."""
    if compilation.needs_autograd:
        return
    devices = {value.device.type for value in compilation.inputs if isinstance(value, Tensor)}
    for device in devices:
        joined, normed = table.joined(device), table.normed(device)
        if joined is None or normed is None:
            continue
        mode, memory = compilation.fake_mode, compilation.memory()
        graphs = (scope.graph for scope in compilation.root.walk())
        moved = sum(fuse_norms(graph, mode, joined[0], normed, memory) for graph in graphs)
        log.debug("%d norms into the operator of their linears", moved)


# What is left in float gets out of the way: what the log calls it, the pass, and when it applies.
InFloat = Callable[[fx.Graph, Any, Memory], int]
IN_FLOAT: tuple[tuple[str, InFloat, Callable[[Compilation], bool]], ...] = (
    (
        "attentions of few rows",
        attend_few,
        lambda compilation: table.attends("cpu", few=True) and not compilation.needs_autograd,
    ),
    ("attentions of decode by key heads", group_heads, lambda compilation: True),
    (
        "attentions of many rows by blocks",
        attend_many,
        lambda compilation: table.attends("cpu", few=False) and not compilation.needs_autograd,
    ),
    ("values that every layer reads, once", compute_once, lambda compilation: True),
    (
        "linears of one row as sums",
        lambda graph, fake_mode, _: one_row(graph, fake_mode),
        lambda compilation: not compilation.needs_autograd,
    ),
)


def speed_up_float(compilation: Compilation) -> None:
    """The passes of ``IN_FLOAT`` on every graph."""
    for what, run, applies in IN_FLOAT:
        if applies(compilation):
            mode, memory = compilation.fake_mode, compilation.memory()
            graphs = (scope.graph for scope in compilation.root.walk())
            log.debug("%d %s", sum(run(graph, mode, memory) for graph in graphs), what)


def report(compilation: Compilation) -> None:
    """Hands the decisions to whoever asked for them (``collect_reports``) and to the log."""
    made = Report(
        decisions=tuple(compilation.decisions),
        kernel=table.describe(),
        original=_readable(compilation.original),
        graph=_readable(compilation.root.gm),
        quantizations=compilation.quantizations,
        float_bytes=sum(weight.float_bytes for weight in compilation.packed),
        int8_bytes=sum(weight.nbytes for weight in compilation.packed),
        unused=compilation.options.unused([each.path for each in compilation.decisions]),
    )
    log.info("%s", made)
    publish(made)


def _readable(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)
