"""Select: which candidates are rewritten, by one table of rules; the first that objects refuses."""

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from int8fx.kernels.quantize import overflow_reason
from int8fx.passes.canonicalize import Candidate
from int8fx.passes.ranking import ranked_by
from int8fx.passes.weight_expression import WeightExpression

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A GPU has fused attention, which a product of its own, matrix by matrix, would only slow down.
MATMUL_DEVICES = ("cpu",)


@dataclass(frozen=True)
class Selection:
    """What the rules look at.

    Attributes:
        tensors: the real tensor behind each weight placeholder of the outermost graph.
        paths: the module path of each weight placeholder.
        skip, only: fnmatch patterns on module paths (of the module, not of its weight).
        skips_by_default: whether a weight that is also an embedding, and a router of experts, stays in
            float.
        kernel_reason: why a device cannot be served, or None when it can.
        mutated: placeholders that the graph itself writes to.
        attention: whether products of two activations are rewritten.
        weight_reason: why the weight of a module path cannot be quantised, or read as what it already
            is; or empty.
    """

    tensors: Mapping[fx.Node, Tensor]
    paths: Mapping[fx.Node, str]
    skip: tuple[str, ...]
    only: tuple[str, ...] | None
    skips_by_default: bool
    kernel_reason: Callable[[str], str | None]
    mutated: frozenset[fx.Node]
    weight_reason: Callable[[str, Tensor, WeightExpression], str]
    attention: bool = False


REQUIRES_GRAD = "weight requires grad"
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
        if device not in MATMUL_DEVICES:
            return f"two activations on {device}: their int8 product is there on {MATMUL_DEVICES} only"
    K = left.shape[-1]
    # A size that varies is checked when it runs.
    return overflow_reason(K) if isinstance(K, int) else ""


def module_path(candidate: Candidate, selection: Selection) -> str:
    """The path of the module that owns the weight: ``mlp.up_proj`` for ``mlp.up_proj.weight``.

    A head that is tied to the embedding is ``lm_head``, though Dynamo met its weight elsewhere first.
    """
    if candidate.weight is None:
        return candidate.node.name
    if _is_embedding(candidate) and (head := _linear_around(candidate.node)):
        return head
    path = selection.paths.get(candidate.weight.placeholder, candidate.node.name)
    return path.removesuffix(".weight")


# What Dynamo calls the outermost module, as L['self'].
_ROOT = re.compile(r"^[LG]\['[^']+'\]\.?")


def _linear_around(node: fx.Node) -> str:
    """The path of the ``nn.Linear`` in whose forward a node is, or empty."""
    stack = node.meta.get("nn_module_stack")
    name, kind = list(stack.values())[-1] if stack else ("", None)
    return _ROOT.sub("", name) if isinstance(kind, type) and issubclass(kind, nn.Linear) else ""


def _is_embedding(candidate: Candidate) -> bool:
    """Whether the weight is an embedding's as well."""
    assert candidate.weight is not None
    return any(user.target is F.embedding for user in candidate.weight.placeholder.users)


def _skipped(candidate: Candidate, selection: Selection) -> str:
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
    return TIED_HEAD if selection.skips_by_default and _is_embedding(candidate) else ""


def _router(candidate: Candidate, selection: Selection) -> str:
    """A small error of a router's output sends a row to another expert, which no bound covers; Fedus
    et al. 2021, arXiv 2101.03961, section 2.4, keep routers in fp32 for it, and so do others."""
    if selection.skips_by_default and (ranking := ranked_by(candidate.node)):
        return f"skip: a router (its output is ranked by {ranking})"
    return ""


def _requires_grad(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None
    trainable = selection.tensors[candidate.weight.placeholder].requires_grad
    return REQUIRES_GRAD if trainable and torch.is_grad_enabled() else ""


def _dtype(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None and candidate.x is not None
    weight = selection.tensors[candidate.weight.placeholder]
    value = candidate.x.meta.get("example_value")
    if not isinstance(value, Tensor):
        return "the input is no tensor"
    if value.is_nested:
        return "the input is a nested tensor"
    for tensor, what in ((weight, "weight"), (value, "input")):
        if tensor.dtype not in DTYPES:
            return f"{what} of {tensor.dtype}: int8 takes the place of fp32, bf16 and fp16 only"
    return ""


def _device(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None and candidate.x is not None
    weight = selection.tensors[candidate.weight.placeholder]
    input_device = candidate.x.meta["example_value"].device
    if weight.device.type != input_device.type:
        return f"input on {input_device}, weight on {weight.device}"
    return selection.kernel_reason(weight.device.type) or ""


def _real_weight(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None
    tensor = selection.tensors[candidate.weight.placeholder]
    return selection.weight_reason(module_path(candidate, selection), tensor, candidate.weight)


def _mutated(candidate: Candidate, selection: Selection) -> str:
    assert candidate.weight is not None
    if candidate.weight.placeholder in selection.mutated:
        return "the graph writes to this weight"
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
    tensor = selection.tensors[candidate.weight.placeholder]
    # Views of a meta tensor have the right shape, and touch no memory.
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tuple(candidate.weight.evaluate(meta).shape)


Rule = Callable[[Candidate, Selection], str]
RULES: tuple[Rule, ...] = (
    _skipped,
    _not_only,
    _tied_head,
    _router,
    _real_weight,
    _mutated,
    _dtype,
    _size,
    _device,
    _requires_grad,
)
