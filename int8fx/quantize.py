"""``quantize_`` and ``dequantize_``: a model's weights to int8 and back, in place, one by one."""

import importlib
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from int8fx import state_dict, structure, torch_private
from int8fx.kernels import table
from int8fx.options import Options
from int8fx.passes.decision import Decision
from int8fx.passes.select import TIED_HEAD, columns_reason, only_reason, size_reason, skip_reason
from int8fx.quantized_weight import Int8Weight
from int8fx.torch_private import storage_id
from int8fx.weight_operators import DTYPES

log = logging.getLogger(__name__)

OPTIONS = ("threshold", "decomposition", "skip", "only")
ALREADY = "already in int8"


def quantize_(model: nn.Module, **options: Any) -> nn.Module:
    """Replaces the weights of a model's linears by their int8 form, in place.

    One weight after another, so that memory peaks one weight above the final size. The modules stay
    what they are; each ``weight`` becomes an ``Int8Weight``, whose ``state_dict`` entries are
    ``weight`` (int8) and ``weight_scale`` (``int8fx/state_dict.py``). The model runs eagerly, and
    compiles with ``backend="llmint8"`` to what the float model would compile to, bit for bit.

    Args:
        model: on any device, "meta" included. Weights that are in int8 already stay; those that a
            compile released (``release_weights``) may be read by everything from then on.
        options: ``threshold``, ``decomposition``, ``skip``, ``only``, as for ``torch.compile``
            (``int8fx.Options``). The first two are kept with the weights.

    Returns:
        The model.

    Raises:
        ValueError: an option is unknown or out of range, no weight of the model can be quantised, or
            FSDP2 has it in use already; the message says why not. The model is as it was.
    """
    checked = Options.parse(options, "quantize_", OPTIONS)
    sites = _sites(model, checked)
    released = [p for p in model.parameters() if isinstance(p, Int8Weight) and p.released]
    experts = _experts(model, checked)
    if not released and not any(site.accepted or site.reason == ALREADY for site in sites):
        found = (*(site.decision for site in sites), *experts)
        reasons = "".join(f"\n  {decision}" for decision in found)
        raise ValueError(f"quantize_ found no weight to quantise in {type(model).__name__}{reasons}")
    shards = _shards(model, "quantize_")
    for kept in released:
        kept.released = False
    for shared in _by_weight(sites):
        weight = shared[0].weight
        quantized = _quantized(weight, shared[0].transposed, checked)
        if id(weight) in shards:
            torch_private.replace_shard(shards[id(weight)], quantized)
        for site in shared:
            site.module.weight = quantized
            state_dict.attach(site.module)
    state_dict.check_on_load(model)
    for site in sites:
        log.debug("%s", site.decision)
    _tell_hugging_face("quantized", model, options)
    warn_of_experts(model, experts)
    return model


def decisions(model: nn.Module, **options: Any) -> list[Decision]:
    """What ``quantize_`` would do with each linear of a model and with its experts, and why."""
    checked = Options.parse(options, "quantize_", OPTIONS)
    return [*(site.decision for site in _sites(model, checked)), *_experts(model, checked)]


EXPERTS = "experts in one batch of matrices: the backend quantises them when it compiles the model"


def _experts(model: nn.Module, options: Options) -> list[Decision]:
    found = []
    for path, batch in structure.experts(model):
        reason = skip_reason(path, options.skip) or only_reason(path, options.only) or EXPERTS
        found.append(structure.of_experts(path, batch, reason))
    return found


def warn_of_experts(model: nn.Module, found: Sequence[Decision]) -> None:
    """Warns once of experts among these decisions that nobody asked to leave in float."""
    left = [decision for decision in found if decision.reason == EXPERTS]
    if left:
        warnings.warn(structure.warning_of(model, left), UserWarning, stacklevel=3)


def first_int8(model: Any) -> str:
    """The name of the first parameter in int8, of a module that has one; or empty."""
    if not isinstance(model, nn.Module):
        return ""
    return next((n for n, p in model.named_parameters() if isinstance(local(p), Int8Weight)), "")


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces the int8 weights of a model by float parameters, in place: ``w_int8 · w_scale``.

    Args:
        dtype: of the parameters; by default that which each weight had.

    Returns:
        The model.

    Raises:
        ValueError: a weight is offloaded by accelerate, or FSDP2 has the model in use; it is as it was.
    """
    shards = _shards(model, "dequantize_")
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(local(weight), Int8Weight):
                if weight.is_meta and hasattr(module, "_hf_hook"):
                    raise ValueError(
                        f"dequantize_: a weight of shape {list(weight.shape)} is offloaded; bring it "
                        "back with accelerate.hooks.remove_hook_from_submodules(model) first"
                    )
                owners[id(weight)].append((module, name))
    for shared in owners.values():
        weight = getattr(*shared[0])
        floats = _map_local(
            weight, lambda part: torch_private.out_of_inference_mode(part.dequantize(dtype))
        )
        parameter = nn.Parameter(floats, requires_grad=False)
        if id(weight) in shards:
            torch_private.replace_shard(shards[id(weight)], parameter)
        for module, name in shared:
            setattr(module, name, parameter)
    _tell_hugging_face("dequantized", model)
    return model


# Models that write what they are beside their files: where their class is, and what tells them.
_WITH_FILES = {
    "transformers.modeling_utils": "int8fx.integrations.transformers",
    "diffusers.models.modeling_utils": "int8fx.integrations.diffusers",
}


def _tell_hugging_face(event: str, model: nn.Module, *args: Any) -> None:
    for needed, integration in _WITH_FILES.items():
        # Importing it takes seconds; without it no module can be one of its models.
        if needed in sys.modules:
            getattr(importlib.import_module(integration), event)(model, *args)


def _shards(model: nn.Module, name: str) -> dict[int, Any]:
    """What FSDP2 keeps of a model.

    Raises:
        ValueError: it has put weights together already, and would go on with those.
    """
    shards = torch_private.fsdp_shards(model)
    if any(torch_private.was_gathered(shard) for shard in shards.values()):
        raise ValueError(
            f"{name}: FSDP2 has this model in use already; call {name} before the model is first called"
        )
    return shards


# --- which weights -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Site:
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


def _kinds() -> dict[type[nn.Module], bool]:
    """The modules whose weight is a linear's, and whether they keep it as ``[K, N]``."""
    kinds: dict[type[nn.Module], bool] = {nn.Linear: False}
    # Importing it takes seconds; without it no model can hold one.
    hugging_face = sys.modules.get("transformers.pytorch_utils")
    if hugging_face is not None:
        kinds[hugging_face.Conv1D] = True
    return kinds


def keeps_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as ``[K, N]``."""
    return any(transposed for kind, transposed in _kinds().items() if isinstance(module, kind))


def _sites(model: nn.Module, options: Options) -> list[_Site]:
    kinds = _kinds()
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
        site = _Site(path, module, structure.modules_around(path, modules), kinds[kind])
        if type(module).forward is not kind.forward:
            site.reason = f"{type(module).__name__} overrides the forward of {kind.__name__}"
        elif id(module) in inside_attention:
            site.reason = "its projections are inside one fused call of torch"
        else:
            site.reason = next(filter(None, (rule(site, options) for rule in RULES)), "")
        sites.append(site)
    _refuse_what_others_hold(model, sites, options)
    return sites


def _already(site: _Site, options: Options) -> str:
    return ALREADY if isinstance(local(site.weight), Int8Weight) else ""


def _skip(site: _Site, options: Options) -> str:
    return skip_reason(site.path, options.skip)


def _only(site: _Site, options: Options) -> str:
    return only_reason(site.path, options.only)


def _ranked(site: _Site, options: Options) -> str:
    """As the backend decides (``passes/select.py``), which sees it in the graph."""
    N, K = site.rows_and_columns
    return structure.ranked_reason(site.path, site.around, N, K) if options.skips_by_default else ""


def _low_rank(site: _Site, options: Options) -> str:
    return structure.factor_reason(site.path, site.around) if options.only is None else ""


def _plain(site: _Site, options: Options) -> str:
    weight = local(site.weight)
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}, no plain tensor"
    if any(part.is_partial() for part in getattr(site.weight, "placements", ())):
        return "each process holds a term of the weight, no part of it"
    return ""


def _dtype(site: _Site, options: Options) -> str:
    dtype = site.weight.dtype
    return "" if dtype in DTYPES else f"weight of {dtype}: int8 takes the place of fp32, bf16 and fp16"


def _size(site: _Site, options: Options) -> str:
    shape = tuple(local(site.weight).shape)
    return size_reason(shape[::-1] if site.transposed else shape)


def _few_columns(site: _Site, options: Options) -> str:
    return columns_reason(site.rows_and_columns[1], options.only)


def _device(site: _Site, options: Options) -> str:
    device = site.weight.device.type
    return "" if device == "meta" else table.refusal(device) or ""


Rule = Callable[[_Site, Options], str]
RULES: tuple[Rule, ...] = (
    *(_already, _skip, _only, _plain, _dtype, _size),
    *(_ranked, _low_rank, _few_columns, _device),
)


def _refuse_what_others_hold(model: nn.Module, sites: list[_Site], options: Options) -> None:
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
class _Holder:
    path: str
    module: nn.Module
    name: str

    def is_weight_of(self, accepted: dict[int, _Site]) -> bool:
        return self.name == "weight" and id(self.module) in accepted

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def _holders(model: nn.Module) -> dict[int, list[_Holder]]:
    """The parameters and buffers of a model by the memory that they are in."""
    holders: dict[int, list[_Holder]] = defaultdict(list)
    for path, module in model.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            part = local(tensor)
            # Those have no memory of their own to share.
            without = part.device.type == "meta" or isinstance(part, Int8Weight)
            key = id(tensor) if without else storage_id(part)
            holders[key].append(_Holder(path, module, name))
    return holders


def holders_of(root: Any, tensor: Tensor) -> list[_Holder]:
    """Where else in a model, seen from ``root``, the memory of a parameter is held."""
    return _holders(root).get(storage_id(tensor), []) if isinstance(root, nn.Module) else []


# --- one weight ----------------------------------------------------------------------------------


def _by_weight(sites: list[_Site]) -> list[list[_Site]]:
    """The accepted sites, those of one parameter together."""
    shared: dict[tuple[int, bool], list[_Site]] = defaultdict(list)
    for site in sites:
        if site.accepted:
            shared[id(site.weight), site.transposed].append(site)
    return list(shared.values())


def _quantized(weight: Tensor, transposed: bool, options: Options) -> nn.Parameter:
    def quantize(part: Tensor) -> Int8Weight:
        return Int8Weight.from_float(
            part,
            threshold=options.threshold,
            decomposition=options.decomposition,
            transposed=transposed,
        )

    return nn.Parameter(_map_local(weight, quantize), requires_grad=False)


def _is_distributed(weight: Tensor) -> bool:
    # Importing it takes a second; without it no model can hold one.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(weight, distributed.DTensor)


def local(weight: Any) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if _is_distributed(weight) else weight


def _map_local(weight: Any, function: Callable[[Any], Tensor]) -> Tensor:
    """``function`` of the weight; of a distributed one, of the part in this process."""
    if not _is_distributed(weight):
        return function(weight)
    return type(weight).from_local(
        function(weight.to_local()),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
