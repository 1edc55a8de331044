"""How many floating-point operations a node of a graph stands for, by torch's own count."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, fx

from int8fx.passes.graph.mutation import writes_in_place


def flops(node: fx.Node, fake_mode: Any, counter: AbstractContextManager) -> int:
    """Runs a call on the fake values of its arguments and counts.

    0 for what writes in place (the fake values are the graph's), whose result is no tensor of a known
    size, and for higher-order operators, whose bodies are graphs of their own, counted there.

    Args:
        counter: ``torch.utils.flop_counter.FlopCounterMode``, new.
    """
    if node.op not in ("call_function", "call_method") or writes_in_place(node):
        return 0
    if not _has_known_size(node) or any(each.op == "get_attr" for each in node.all_input_nodes):
        return 0
    values = fx.map_arg((node.args, node.kwargs), _value)
    args, kwargs = values
    with counter as counted, fake_mode:
        if node.op == "call_method":
            getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.target(*args, **kwargs)  # type: ignore[operator]
    return counted.get_total_flops()


def _has_known_size(node: fx.Node) -> bool:
    value = _value(node)
    # A size that depends on data would make a new symbol, which the graph's own could meet.
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")
