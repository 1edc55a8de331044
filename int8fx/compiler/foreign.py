"""Linears of other packages whose weights are int8 already."""

from int8fx.compiler.capture import owner_path
from int8fx.compiler.compilation import Compilation
from int8fx.compiler.swap import Slot
from int8fx.kernels.formats.int8 import OF_BITSANDBYTES
from int8fx.kernels.schemes.table import DEFAULT, SCHEMES
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.passes.linears import bitsandbytes_nodes
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.select import (
    WRITTEN,
    only_reason,
    skip_reason,
)


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
        own = SCHEMES[DEFAULT].choice(threshold=linear.threshold, decomposition="column")
        choice = options.settled(SCHEMES[DEFAULT], path, own)
        bitsandbytes_nodes.replace(linear, w_packed, choice.lower, compilation.fake_mode)
    return found
