"""What modules say about their linears, for ``quantize_``, which sees no graph.

The backend sees what becomes of an output (``passes/linears/ranking.py``,
``passes/linears/low_rank.py``). Here the
modules around a linear tell: how many experts they hold, what their classes are called, and which
linears are beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from int8fx.kernels.ops.limits import DTYPES
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.low_rank import is_low_rank
from int8fx.passes.linears.select import LEAST_K, LOW_RANK

# What chooses experts, keys or codes, as transformers and others call the classes.
_ROUTERS = re.compile(r"Router|Gating$|MoE\w*Gate$")
_CHOOSERS = re.compile(r"Indexer|VectorQuantizer|Codebook")
# What a linear that chooses experts is called beside them.
_GATES = ("gate", "router")
# Attributes that say how many experts there are, and not how many of them a token meets.
_COUNTS = re.compile(r"(n|num)_(?!.*per_)\w*(experts|router_classes)$")
_NEAR = 3  # levels of modules
_FUNCTIONS = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
    *(nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Mish),
)


def modules_around(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules that hold the one of a path, the nearest first."""
    parts = path.split(".") if path else []
    return [modules[".".join(parts[:end])] for end in reversed(range(len(parts)))]


def ranked_reason(path: str, around: Sequence[nn.Module], N: int, K: int) -> str:
    """Why a linear ``[N, K]`` is one of those whose output is ranked, or empty."""
    if not around:
        return ""
    name, owner = path.rpartition(".")[2], type(around[0]).__name__
    chooser = next((kind for each in around[:_NEAR] if _CHOOSERS.search(kind := _name(each))), "")
    if chooser:
        return f"skip: its output is ranked ({name} of {chooser})"
    counts = _expert_counts(around)
    in_router = any(_ROUTERS.search(_name(each)) for each in around[:2])
    beside = name in _GATES and hasattr(around[0], "experts")
    chooses = N in counts if counts else in_router
    return f"skip: a router ({name} of {owner})" if N < K and (chooses or beside) else ""


def _expert_counts(around: Sequence[nn.Module]) -> set[int]:
    """How many experts the nearest module holds that holds any, and what it says there are."""
    for module in around[:_NEAR]:
        if isinstance(module, nn.ModuleList):  # of experts or of layers, whose owner comes next
            continue
        held = {len(batch) for child in module.children() for batch in _batches(child).values()}
        held |= {
            len(child)
            for name, child in module.named_children()
            if isinstance(child, nn.ModuleList) and "expert" in name.lower()
        }
        said = {
            value
            for name, value in vars(module).items()
            if _COUNTS.match(name) and type(value) is int and value > 1
        }
        if held or said:
            return held | said
    return set()


def _name(module: nn.Module) -> str:
    return type(module).__name__


# --- low-rank factors ----------------------------------------------------------------------------


def factor_reason(path: str, around: Sequence[nn.Module]) -> str:
    """Why a linear is a factor of an adapter, or empty.

    Either what is adapted is there as ``base_layer``, as peft has it, or two linears in one module have
    a product of low rank: in a sequence, or beside a linear of the product's shape.
    """
    names = path.split(".")
    for level, module in enumerate(around[:_NEAR], 1):
        if isinstance(getattr(module, "base_layer", None), nn.Module) and names[-level] != "base_layer":
            return LOW_RANK
    return LOW_RANK if around and names[-1] in _factors(around[0]) else ""


def _factors(owner: nn.Module) -> set[str]:
    """The names of the linears in a module that are low-rank factors."""
    linears = {
        name: child
        for name, child in owner.named_children()
        if isinstance(child, nn.Linear) and child.weight.dim() == 2
    }
    shapes = [tuple(linear.weight.shape) for linear in linears.values()]
    found = set()
    for first, second, changed in _chains(owner, linears):
        (r, K), (N, columns) = linears[first].weight.shape, linears[second].weight.shape
        beside = isinstance(owner, nn.Sequential) or (N, K) in shapes
        if columns == r and beside and is_low_rank(r, N, K, changed):
            found |= {first, second}
    return found


def _chains(owner: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[tuple[str, str, bool]]:
    """Pairs of linears of which the second may read the first, and whether through a function."""
    if not isinstance(owner, nn.Sequential):
        yield from (
            (first, second, False) for first in linears for second in linears if first != second
        )
        return
    last, changed = "", False
    for name, child in owner.named_children():
        if name in linears:
            if last:
                yield last, name, changed
            last, changed = name, False
        elif isinstance(child, _FUNCTIONS):
            changed = True
        elif not isinstance(child, (nn.Dropout, nn.Identity)):
            last = ""


# --- experts -------------------------------------------------------------------------------------


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KERNELS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Bilinear)


def _batches(module: nn.Module) -> dict[str, Tensor]:
    """The batches of matrices ``[E, N, K]`` among a module's own parameters, but for kernels."""
    if isinstance(module, _KERNELS):
        return {}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in DTYPES
        and parameter.dim() == 3
        and len(parameter) > 1
        and min(parameter.shape[1:]) >= LEAST_K
    }


def experts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and batches ``[E, N, K]`` of what a model calls experts, or counts as such."""
    for path, module in model.named_modules():
        counted: dict[str, Any] = {name: n for name, n in vars(module).items() if _COUNTS.match(name)}
        for name, batch in _batches(module).items():
            if "expert" in f"{path}.{_name(module)}".lower() or len(batch) in counted.values():
                yield f"{path}.{name}".lstrip("."), batch


def of_experts(path: str, batch: Tensor, reason: str) -> Decision:
    """What becomes of the experts of a batch ``[E, N, K]``."""
    E, N, K = batch.shape
    return Decision(path, "experts", (N, K), not reason, reason, experts=E)


def warning_of(model: nn.Module, left: Sequence[Decision]) -> str:
    """That these experts stay in float, how much of the model they are, and what quantises them."""
    count = sum(each.experts * each.shape[0] * each.shape[1] for each in left if each.shape)
    share = count / max(1, sum(parameter.numel() for parameter in model.parameters()))
    places = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", each.path) for each in left})
    return (
        f"quantize_ leaves {count:,} parameters in float, {share:.0%} of {_name(model)}: experts, in "
        f"{', '.join(places)}. They are batches of matrices, and quantize_ replaces linears' weights. "
        'torch.compile(model, backend="llmint8") has them in int8 when it compiles the model'
    )
