"""Which weights of a model ``quantize_`` takes: the modules whose weight a linear reads, and the
rules."""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from int8fx.kernels.ops.limits import DTYPES
from int8fx.options import Options
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.select import (
    TIED_HEAD,
    columns_reason,
    only_reason,
    size_reason,
    skip_reason,
)
from int8fx.torch_private import storage_id
from int8fx.weights import structure
from int8fx.weights.distributed import local
from int8fx.weights.qat_linear import PreparedLinear
from int8fx.weights.tensor import QuantizedWeight

ALREADY = "already "  # what the reason of a quantised weight begins with
PREPARED = "its weight is trained (QAT): int8fx.convert_qat_ quantises it"


@dataclass(eq=False)
class Site:
    """One module whose ``weight`` a linear reads, and why it stays as it is (empty: it does not).

    ``around`` are the modules that it is in, the nearest first.
    """

    path: str
    module: nn.Module
    around: list[nn.Module]
    transposed: bool
    reason: str = ""

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def rows_and_columns(self) -> tuple[int, ...]:
        """``(N, K)``."""
        return tuple(self.weight.shape)[:: -1 if self.transposed else 1]

    @property
    def accepted(self) -> bool:
        return not self.reason

    @property
    def decision(self) -> Decision:
        rows = self.rows_and_columns
        shape = (rows[0], rows[1]) if len(rows) == 2 else None
        return Decision(self.path, type(self.module).__name__, shape, self.accepted, self.reason)


def linear_kinds() -> dict[type[nn.Module], bool]:
    """The modules whose weight is a linear's, and whether they keep it as ``[K, N]``."""
    kinds: dict[type[nn.Module], bool] = {nn.Linear: False}
    # Importing it takes seconds; without it no model can hold one.
    hugging_face = sys.modules.get("transformers.pytorch_utils")
    if hugging_face is not None:
        kinds[hugging_face.Conv1D] = True
    return kinds


def keeps_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as ``[K, N]``."""
    return any(transposed for kind, transposed in linear_kinds().items() if isinstance(module, kind))


def sites_of(model: nn.Module, options: Options) -> list[Site]:
    kinds = linear_kinds()
    inside_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    sites = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        if kind is None:
            continue
        site = Site(path, module, structure.modules_around(path, modules), kinds[kind])
        if isinstance(module, PreparedLinear):
            site.reason = PREPARED
        elif type(module).forward is not kind.forward:
            site.reason = f"{type(module).__name__} overrides the forward of {kind.__name__}"
        elif id(module) in inside_attention:
            site.reason = "its projections are inside one fused call of torch"
        else:
            site.reason = next(filter(None, (rule(site, options) for rule in RULES)), "")
        sites.append(site)
    _refuse_what_others_hold(model, sites, options)
    return sites


def _already(site: Site, options: Options) -> str:
    weight = local(site.weight)
    if not isinstance(weight, QuantizedWeight):
        return ""
    kind = weight.weight_format.kind
    return f"{ALREADY}in int8" if kind == "int8" else f"{ALREADY}{weight.weight_format.name}"


def _skip(site: Site, options: Options) -> str:
    if options.skips_by_default and options.quantizes_head(site.path):
        return ""
    return skip_reason(site.path, options.skip)


def _only(site: Site, options: Options) -> str:
    return only_reason(site.path, options.only)


def _ranked(site: Site, options: Options) -> str:
    """As the backend decides (``passes/linears/select.py``), which sees it in the graph."""
    N, K = site.rows_and_columns
    return structure.ranked_reason(site.path, site.around, N, K) if options.skips_by_default else ""


def _low_rank(site: Site, options: Options) -> str:
    return structure.factor_reason(site.path, site.around) if options.only is None else ""


def _plain(site: Site, options: Options) -> str:
    weight = local(site.weight)
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}, no plain tensor"
    if any(part.is_partial() for part in getattr(site.weight, "placements", ())):
        return "each process holds a term of the weight, no part of it"
    return ""


def _dtype(site: Site, options: Options) -> str:
    dtype = site.weight.dtype
    return "" if dtype in DTYPES else f"weight of {dtype}: int8 takes the place of fp32, bf16 and fp16"


def _size(site: Site, options: Options) -> str:
    shape = tuple(local(site.weight).shape)
    return size_reason(shape[::-1] if site.transposed else shape)


def _few_columns(site: Site, options: Options) -> str:
    return columns_reason(site.rows_and_columns[1], options.only)


def _device(site: Site, options: Options) -> str:
    if site.weight.is_meta:
        return ""
    return options.choice(site.path).refusal(site.weight.device.type) or ""


Rule = Callable[[Site, Options], str]


RULES: tuple[Rule, ...] = (
    *(_already, _skip, _only, _plain, _dtype, _size),
    *(_ranked, _low_rank, _few_columns, _device),
)


def _refuse_what_others_hold(model: nn.Module, sites: list[Site], options: Options) -> None:
    """A weight is quantised for all that hold it, or not at all.

    Others hold the parameter itself (an embedding tied to the head), or other views of its memory:
    those would keep the float bytes alive, and no longer see a change of the weight.
    """
    holders = _holders(model)
    accepted = {id(site.module): site for site in sites if site.accepted}
    found = True
    while found:
        found = False
        for holding in holders.values():
            stays = [holder for holder in holding if not holder.is_weight_of(accepted)]
            going = [holder for holder in holding if holder.is_weight_of(accepted)]
            if not stays:
                continue
            tied = isinstance(stays[0].module, nn.Embedding) and options.skips_by_default
            for holder in going:
                reason = TIED_HEAD if tied else f"shares memory with {stays[0]}, which stays in float"
                accepted.pop(id(holder.module)).reason = reason
                found = True


@dataclass(frozen=True)
class Holder:
    path: str
    module: nn.Module
    name: str

    def is_weight_of(self, accepted: dict[int, Site]) -> bool:
        return self.name == "weight" and id(self.module) in accepted

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def _holders(model: nn.Module) -> dict[int, list[Holder]]:
    """The parameters and buffers of a model by the memory that they are in."""
    holders: dict[int, list[Holder]] = defaultdict(list)
    for path, module in model.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            part = local(tensor)
            # Those have no memory of their own to share.
            without = part.is_meta or isinstance(part, QuantizedWeight)
            key = id(tensor) if without else storage_id(part)
            holders[key].append(Holder(path, module, name))
    return holders


def holders_of(root: Any, tensor: Tensor) -> list[Holder]:
    """Where else in a model, seen from ``root``, the memory of a parameter is held."""
    return _holders(root).get(storage_id(tensor), []) if isinstance(root, nn.Module) else []


def by_weight(sites: list[Site]) -> list[list[Site]]:
    """The accepted sites, those of one parameter together."""
    shared: dict[tuple[int, bool], list[Site]] = defaultdict(list)
    for site in sites:
        if site.accepted:
            shared[id(site.weight), site.transposed].append(site)
    return list(shared.values())
