"""Compute once: what depends on positions alone, and every layer reads, is computed before them.

    cos = emb.cos().to(bf16)                      cos = int8fx.once(emb.cos().to(bf16))
    mask = (keys <= queries).expand(...)          mask = int8fx.once(keys <= queries).expand(...)

Inductor fuses such an expression into each kernel that reads it: a Llama's cosine and sine once for
every layer and head, and its mask, byte by byte, for every attention. In a prefill of 512 tokens of
SmolLM2 that was a ninth of the time (two cores of Zen 4); written once, it is nothing.
"""

import math

from torch import Tensor, fx

from int8fx.kernels.devices import float_speed
from int8fx.kernels.ops.once import once
from int8fx.passes.contract import Context, Result
from int8fx.passes.graph.emit import Emitter
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.values import shape_of, tensor_of
from int8fx.passes.graph.weight_expression import is_view_or_cast

READERS = 4  # with fewer, Inductor's way is as good
ELEMENTS = 4096  # less is computed in the time of a call

FEW_READERS = f"fewer than {READERS} calls read it"


def compute_once(graph: fx.Graph, context: Context) -> Result:
    """Does so in one graph; changed: for how many values."""
    memory, result = context.memory(), Result()
    positional: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if _is_positional(node, positional):
            positional.add(node)
            if _is_large_result(node, memory):
                found.append(node)
    read = [node for node in found if _readers(node, positional) >= READERS]
    for node in read:
        with graph.inserting_after(node):
            value = Emitter(graph, context.fake_mode, node).call(once, node)
        node.replace_all_uses_with(value, delete_user_cb=lambda user, value=value: user is not value)
    result.changed = len(read)
    result.refuse(FEW_READERS, len(found) - len(read))
    return result


def _is_positional(node: fx.Node, positional: set[fx.Node]) -> bool:
    """Computed from integers and vectors (inverse frequencies) alone, without a gradient."""
    value = tensor_of(node)
    if value is not None and (value.requires_grad or not _is_slow(value)):
        return False
    if node.op == "placeholder":
        return value is None or not value.is_floating_point() or value.dim() <= 1
    return node.op in ("call_function", "call_method") and positional.issuperset(node.all_input_nodes)


def _is_slow(value: Tensor) -> bool:
    return float_speed(value.device.type).computing_again_is_slow


def _is_large_result(node: fx.Node, memory: Memory) -> bool:
    """A tensor in memory of its own, so that nothing but its readers can write to it."""
    shape = shape_of(node)
    if node.op == "placeholder" or shape is None:
        return False
    if any(memory.share(node, given) for given in node.all_input_nodes):
        return False
    elements = math.prod(shape)
    return not isinstance(elements, int) or elements >= ELEMENTS


def _readers(node: fx.Node, positional: set[fx.Node]) -> int:
    """How many calls outside read it, or a view of it."""
    return sum(
        _readers(user, positional) if user in positional and _is_view(user) else user not in positional
        for user in node.users
    )


def _is_view(node: fx.Node) -> bool:
    """Of its first argument: a cast to another dtype is a result of its own."""
    value, given = tensor_of(node), tensor_of(node.args[0] if node.args else None)
    same = value is not None and given is not None and value.dtype == given.dtype
    return is_view_or_cast(node) and same
