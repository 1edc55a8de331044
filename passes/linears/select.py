"""Select: which candidates are rewritten, by one table of rules; the first that objects refuses."""

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from int8fx.kernels.devices import activations_reason, same_kind
from int8fx.kernels.ops.limits import DTYPES
from int8fx.kernels.ops.quantize_reference import overflow_reason
from int8fx.passes.graph.mutation import Memory
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.passes.linears.canonicalize import Candidate


@dataclass(frozen=True)
class Selection:
    """What the rules look at.

    Attributes:
        tensors: the real tensor behind each weight placeholder of the outermost graph.
        paths: the module path of each weight placeholder.
        skip, only: fnmatch patterns on module paths (of the module, not of its weight).
        skips_by_default: whether a weight that is also an embedding, and what is ranked, stay in float.
        kernel_reason: why the device of the weight of a module path cannot be served, or None when it
            can.
        records_gradients: whether the graph, or a part of it, does.
        memory: where the graph writes to, and what shares memory with what.
        attention: whether products of two activations are rewritten.
        weight_reason: why the weight of a module path cannot be quantised, or read as what it already
            is; or empty.
        ranked_by: what ranks the values of a node (``passes/linears/ranking.py``), or empty.
        factors: nodes of linears that are a low-rank factor (``passes/linears/low_rank.py``).
        quantizes_head: whether the scheme of a module path quantises an output head, too, so that the
            default of ``skip`` leaves rankings in float alone.
    """

    tensors: Mapping[fx.Node, Tensor]
    paths: Mapping[fx.Node, str]
    skip: tuple[str, ...]
    only: tuple[str, ...] | None
    skips_by_default: bool
    kernel_reason: Callable[[str, Tensor], str | None]
    memory: Memory
    records_gradients: bool
    weight_reason: Callable[[str, Tensor, WeightExpression], str]
    ranked_by: Callable[[fx.Node], str]
    factors: frozenset[fx.Node]
    attention: bool = False
    quantizes_head: Callable[[str], bool] = lambda path: False


REQUIRES_GRAD = "weight requires grad"
# Below it a product is coordinates, angles or a few numbers, and a call costs more than it saves.
LEAST_K = 16
BY_NAME = "name it in `only` to have it in int8"
NOT_LEARNED = f"it was computed, not learned; {BY_NAME}"
LOW_RANK = f"a low-rank factor, as of an adapter: int8 wins nothing there; {BY_NAME}"
# What a router does; others find the nearest of a codebook, or compare.
_CHOOSE_THE_LARGEST = frozenset("topk argmax argsort sort max multinomial gumbel_softmax".split())
WRITTEN = "the graph writes to this weight"
TIED_HEAD = "skip: the output head (its weight is also an embedding)"


def refusal(candidate: Candidate, selection: Selection) -> str:
    """Why a candidate stays as it is, or an empty string: it is rewritten."""
    if candidate.factors is not None and selection.attention:
        return _product_of_activations(candidate, selection)
    if candidate.refusal:
        return candidate.refusal
    for rule in RULES:
        reason = rule(candidate, selection)
        if reason:
            return reason
    return ""


def _product_of_activations(candidate: Candidate, selection: Selection) -> str:
    assert candidate.factors is not None
    left, right = (factor.meta.get("example_value") for factor in candidate.factors)
    if (
        not isinstance(left, Tensor)
        or not isinstance(right, Tensor)
        or min(left.dim(), right.dim()) < 2
    ):
        return "a product of two activations that are no matrices"
    if left.dtype not in DTYPES or left.dtype != right.dtype:
        allowed = "int8 takes the place of fp32, bf16 and fp16 only"
        return f"a product of {left.dtype} and {right.dtype}: {allowed}"
    for device in (left.device.type, right.device.type):
        if reason := activations_reason(device):
            return reason
    K = left.shape[-1]
    # A size that varies is checked when it runs.
    return overflow_reason(K) if isinstance(K, int) else ""


def module_path(candidate: Candidate, selection: Selection) -> str:
    """The path of the module that owns the weight: ``mlp.up_proj`` for ``mlp.up_proj.weight``.

    A head that is tied to the embedding is ``lm_head``, though Dynamo met its weight elsewhere first.
    """
    if candidate.weight is None:
        return candidate.node.name
    if is_embedding(candidate) and (head := _linear_around(candidate.node)):
        return head
    path = selection.paths.get(candidate.weight.placeholder, candidate.node.name)
    return path.removesuffix(".weight")


# What Dynamo calls the outermost module: L['self'], or L['args'][0] where its forward is decorated.
_ROOT = re.compile(r"^(?:L\['args'\]\[\d+\]|[LG]\['[^']+'\])\.?")


def _linear_around(node: fx.Node) -> str:
    """The path of the ``nn.Linear`` in whose forward a node is, or empty."""
    name, kind = _module_around(node)
    return _ROOT.sub("", name) if kind is not None and issubclass(kind, nn.Linear) else ""


def _module_around(node: fx.Node) -> tuple[str, type[nn.Module] | None]:
    """Dynamo's name for the module in whose forward a node is, and its class."""
    stack = node.meta.get("nn_module_stack")
    name, kind = list(stack.values())[-1] if stack else ("", None)
    return name, kind if isinstance(kind, type) else None


def is_embedding(candidate: Candidate) -> bool:
    """Whether the weight is an embedding's as well."""
    assert candidate.weight is not None
    return any(user.target is F.embedding for user in candidate.weight.placeholder.users)


def _skipped(candidate: Candidate, selection: Selection) -> str:
    if selection.skips_by_default and selection.quantizes_head(module_path(candidate, selection)):
        return ""
    return skip_reason(module_path(candidate, selection), selection.skip)


def skip_reason(path: str, skip: tuple[str, ...]) -> str:
    """Why a module stays in float by the option ``skip``, or empty."""
    for pattern in skip:
        if fnmatch.fnmatchcase(path, pattern):
            return f"skip: matches {pattern!r}"
    return ""


def _not_only(candidate: Candidate, selection: Selection) -> str:
    return only_reason(module_path(candidate, selection), selection.only)


def only_reason(path: str, only: tuple[str, ...] | None) -> str:
    """Why a module stays in float by the option ``only``, or empty."""
    if only is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in only):
        return ""
    return "only: matches none of its patterns"


def _tied_head(candidate: Candidate, selection: Selection) -> str:
    in_float = selection.skips_by_default and not selection.quantizes_head(
        module_path(candidate, selection)
    )
    return TIED_HEAD if in_float and is_embedding(candidate) else ""


def _router(candidate: Candidate, selection: Selection) -> str:
    """A small error of a router's output sends a row to another expert, which no bound covers; Fedus
    et al. 2021, arXiv 2101.03961, section 2.4, keep routers in fp32 for it, and so do others."""
    ranked = selection.ranked_by(candidate.node) if selection.skips_by_default else ""
    if not ranked:
        return ""
    router = ranked.removeprefix("ranked by ") in _CHOOSE_THE_LARGEST
    return f"skip: a router (its output is {ranked})" if router else f"skip: its output is {ranked}"


def _low_rank(candidate: Candidate, selection: Selection) -> str:
    """An adapter trains in float: only in float does its evaluation see the same function."""
    left = selection.only is None and candidate.node in selection.factors
    return LOW_RANK if left and _is_plain(candidate, selection) else ""


def _not_learned(candidate: Candidate, selection: Selection) -> str:
    """A filter bank or a transform spans decades, as a spectrum does, in digits that int8 has not."""
    assert candidate.weight is not None
    is_buffer = type(selection.tensors[candidate.weight.placeholder]) is Tensor
    if selection.only is not None or not is_buffer or _is_linear(_module_around(candidate.node)[1]):
        return ""
    return f"a buffer that no linear layer owns: {NOT_LEARNED}"


def _is_linear(kind: type[nn.Module] | None) -> bool:
    """Whether modules of a class are linears: torch's, or any that give themselves ``in_features``."""
    if kind is None or issubclass(kind, nn.Linear) or kind.__name__ == "Conv1D":
        return kind is not None
    code = getattr(kind.__init__, "__code__", None)
    return "in_features" in (*inspect.get_annotations(kind), *getattr(code, "co_names", ()))


def _few_columns(candidate: Candidate, selection: Selection) -> str:
    K = weight_shape(candidate, selection)[-1]
    return columns_reason(K, selection.only) if _is_plain(candidate, selection) else ""


def _is_plain(candidate: Candidate, selection: Selection) -> bool:
    """Whether the weight is in float: one that ``quantize_`` has made int8 was decided on there."""
    assert candidate.weight is not None
    return type(selection.tensors[candidate.weight.placeholder]) in (Tensor, nn.Parameter)


def columns_reason(K: int, only: tuple[str, ...] | None) -> str:
    """Why a weight of so few columns stays in float, or empty: ``only`` has named it."""
    if K >= LEAST_K or only is not None:
        return ""
    return f"K = {K} is below {LEAST_K}: so few terms average no rounding out; {BY_NAME}"


def _requires_grad(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None
    trainable = selection.tensors[candidate.weight.placeholder].requires_grad
    return REQUIRES_GRAD if trainable and selection.records_gradients else ""


def _dtype(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None and candidate.x is not None
    weight = selection.tensors[candidate.weight.placeholder]
    value = candidate.x.meta.get("example_value")
    if not isinstance(value, Tensor):
        return "the input is no tensor"
    for tensor, what in ((weight, "weight"), (value, "input")):
        if tensor.dtype not in DTYPES:
            return f"{what} of {tensor.dtype}: int8 takes the place of fp32, bf16 and fp16 only"
    return ""


def _device(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None and candidate.x is not None
    weight = selection.tensors[candidate.weight.placeholder]
    input_device = candidate.x.meta["example_value"].device
    if not same_kind(weight.device, input_device):
        return f"input on {input_device}, weight on {weight.device}"
    return selection.kernel_reason(module_path(candidate, selection), weight) or ""


def _real_weight(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None
    tensor = selection.tensors[candidate.weight.placeholder]
    return selection.weight_reason(module_path(candidate, selection), tensor, candidate.weight)


def _mutated(candidate: Candidate, selection: Selection) -> str:
    """A weight is read before the graph runs: neither it nor a copy on its way may change in it."""
    assert candidate.weight is not None
    memory, placeholder = selection.memory, candidate.weight.placeholder
    writers = memory.writers(placeholder)
    if not writers:
        of_weight, _ = candidate.passed_over()
        return (
            "the graph writes to a copy of this weight" if any(map(memory.writers, of_weight)) else ""
        )
    if all(map(memory.doubt, writers)):
        doubt = memory.doubt(writers[0])
        return f"{writers[0].name} may write to this weight: what it does is not known ({doubt})"
    others = [
        path
        for other, path in selection.paths.items()
        if other is not placeholder and memory.share(other, placeholder)
    ]
    return WRITTEN + (f", or to {', '.join(others)}, which shares its memory" if others else "")


def _overwritten(candidate: Candidate, selection: Selection) -> str:
    """What was copied for the product is read below the copy, when the product is."""
    _, copies = candidate.passed_over()
    for value in candidate.operands - set(candidate.node.all_input_nodes):
        if selection.memory.written_between(value, candidate.node, [value, *copies]):
            return f"the graph writes to {value.name} between a copy of it and the product"
    return ""


def _size(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None
    return size_reason(weight_shape(candidate, selection), 2 if candidate.routing is None else 3)


def size_reason(shape: tuple[int, ...], rank: int = 2) -> str:
    """Why a weight of shape ``[N, K]``, or ``[E, N, K]``, cannot be quantised, or empty."""
    if len(shape) != rank or 0 in shape:
        return f"the weight has shape {list(shape)}"
    return overflow_reason(shape[-1])


def weight_shape(candidate: Candidate, selection: Selection) -> tuple[int, ...]:
    """The shape of the weight in the form ``[N, K]``, or ``[E, N, K]`` of experts."""
    assert candidate.weight is not None
    return shape_of_weight(candidate.weight, selection.tensors)


def shape_of_weight(weight: WeightExpression, tensors: Mapping[fx.Node, Tensor]) -> tuple[int, ...]:
    tensor = tensors[weight.placeholder]
    # Views of a meta tensor have the right shape, and touch no memory.
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tuple(weight.on_meta(meta).shape)


Rule = Callable[[Candidate, Selection], str]
RULES: tuple[Rule, ...] = (
    _skipped,
    _not_only,
    _tied_head,
    _router,
    _real_weight,
    _mutated,
    _overwritten,
    _dtype,
    _size,
    _device,
    _requires_grad,
    _low_rank,
    _not_learned,
    _few_columns,
)
