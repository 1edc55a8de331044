"""``quantize_`` and ``dequantize_``: a model's weights to int8 and back, in place, one by one."""

import importlib
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from int8fx import torch_private
from int8fx.arguments import AnyModule, check_module
from int8fx.errors import CalibrationError, ReleaseError
from int8fx.kernels.schemes.scheme import Choice
from int8fx.near import warn_of_unused
from int8fx.options import Options
from int8fx.passes.linears.decision import Decision
from int8fx.weights import describe, row_parallel, state_dict, structure
from int8fx.weights.algorithms import apply
from int8fx.weights.algorithms.methods import NEAREST, method_named
from int8fx.weights.distributed import local, map_local
from int8fx.weights.expert_sites import expert_sites, left, quantize_experts
from int8fx.weights.sites import ALREADY, Site, by_weight, sites_of
from int8fx.weights.tensor import QuantizedWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from int8fx.option_names import QuantizeOptions

log = logging.getLogger(__name__)

# And the settings of the schemes.
OPTIONS = ("scheme", "rules", "skip", "only", "calibration")


def _nothing(done: int, total: int) -> None:
    """Of progress."""


def quantize_(
    model: AnyModule,
    *,
    method: str = NEAREST,
    batches: Any = None,
    on_weight: Callable[[int, int], None] = _nothing,
    **options: "Unpack[QuantizeOptions]",
) -> AnyModule:
    """Replaces the weights of a model's linears by their quantised form, in place.

    One weight after another, so that memory peaks one weight above the final size. In fewer than 8 bits
    the experts of transformers' mixtures are quantised, too, each by itself. The modules stay
    what they are; each ``weight`` becomes an ``Int8Weight``, whose ``state_dict`` entries are those of
    its format, of int8 ``weight`` and ``weight_scale`` (``int8fx/weights/state_dict.py``). The model
    runs eagerly, and compiles with ``backend="llmint8"`` to what the float model would compile to with
    the same options, bit for bit.

    Args:
        model: on any device, "meta" included. Weights that are quantised already stay; those that a
            compile released (``release_weights``) may be read by everything from then on.
        method: how integers are chosen: ``"rtn"``, round-to-nearest, in every scheme; for weights by
            groups along K also ``"hqq"``, ``"gptq"`` and ``"awq"`` (``int8fx/weights/algorithms``),
            which give settings that they need a default of their own.
        batches: for ``"gptq"`` and ``"awq"``: what the model is called with, as ``int8fx.calibrate``
            has them.
        on_weight: told how many weights are done, and of how many.
        options: ``scheme``, its settings (``threshold`` and ``decomposition`` of the default one),
            ``rules``, ``skip``, ``only`` and ``calibration``, as for ``torch.compile``
            (``int8fx.Options``). The scheme and its settings, the columns of a calibration among them,
            are kept with the weights.

    Returns:
        The model.

    Examples:
        >>> import int8fx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
        >>> int8fx.quantize_(model, threshold=3.0)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=False, llm.int8, 8 bits, 2,304 bytes)
        )

    Raises:
        TypeError: names what was given in the place of a module.
        ValueError: an option is unknown or out of range, no weight of the model can be quantised, a
            calibration is of another model (``CalibrationError``), a method does not serve a scheme, or
            FSDP2 has it in use already; the message says why not. The model is as it was.
    """
    check_module(model, "quantize_")
    algorithm = method_named(method)
    given: dict[str, Any] = {**({} if algorithm is None else algorithm.settings), **options}
    checked = Options.parse(given, "quantize_", OPTIONS)
    sites = sites_of(model, checked)
    choices = {site.path: site_choice(site, checked) for site in sites if site.accepted}
    released = [p for p in model.parameters() if isinstance(p, QuantizedWeight) and p.released]
    batches_of_experts = expert_sites(model, checked, method)
    experts = [site.decision for site in batches_of_experts]
    found = [*(site.decision for site in sites), *experts]
    if not released and not any(each.accepted or each.reason.startswith(ALREADY) for each in found):
        reasons = "".join(f"\n  {decision}" for decision in found)
        raise ValueError(f"quantize_ found no weight to quantise in {type(model).__name__}{reasons}")
    groups = by_weight(sites)
    apply.check(method, algorithm, batches, groups, choices)
    shards = _shards(model, "quantize_")
    for parameter in released:
        parameter.released = False
    total = len(groups) + sum(not site.reason for site in batches_of_experts)
    solved = (
        ((shared, _quantized(shared[0], choices[shared[0].path], shards)) for shared in groups)
        if algorithm is None
        else apply.solved(model, groups, choices, algorithm, batches)
    )
    for done, (shared, quantized) in enumerate(solved, 1):
        weight = shared[0].weight
        if id(weight) in shards:
            torch_private.replace_shard(shards[id(weight)], quantized)
        for site in shared:
            site.module.weight = quantized
            state_dict.attach(site.module)
        on_weight(done, total)
        del weight, quantized  # the float weight would live while the next one is quantised
    for done, _ in enumerate(quantize_experts(batches_of_experts), len(groups) + 1):
        on_weight(done, total)
    state_dict.check_on_load(model)
    for site in sites:
        log.debug("%s", site.decision)
    _tell_hugging_face("quantized", model, given)
    warn_of_experts(model, experts)
    warn_of_unused(checked, model, stacklevel=2)
    return model


def decisions(model: nn.Module, **options: "Unpack[QuantizeOptions]") -> list[Decision]:
    """What ``quantize_`` would do with each linear of a model and with its experts, and why.

    Raises:
        TypeError, ValueError: as ``quantize_``, of the model and of the options.

    Examples:
        >>> import int8fx, torch
        >>> layers = torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64)
        >>> model = torch.nn.Sequential(*layers)
        >>> for decision in int8fx.decisions(model, skip=["2"]):
        ...     print(decision.path, decision.reason or "int8")
        0 int8
        2 skip: matches '2'
    """
    check_module(model, "decisions")
    checked = Options.parse(options, "quantize_", OPTIONS)
    linears = [site.decision for site in sites_of(model, checked)]
    return [*linears, *(site.decision for site in expert_sites(model, checked))]


def warn_of_experts(model: nn.Module, found: Sequence[Decision]) -> None:
    """Warns once of experts among these decisions that nobody asked to leave in float."""
    if stay := left(found):
        warnings.warn(structure.warning_of(model, stay), UserWarning, stacklevel=3)


def first_int8(model: Any) -> str:
    """The name of the first parameter in int8, of a module that has one; or empty."""
    if not isinstance(model, nn.Module):
        return ""
    return next((n for n, p in model.named_parameters() if isinstance(local(p), QuantizedWeight)), "")


def dequantize_(model: AnyModule, dtype: torch.dtype | None = None) -> AnyModule:
    """Replaces the int8 weights of a model by float parameters, in place: ``w_int8 · w_scale``.

    Args:
        dtype: of the parameters; by default that which each weight had.

    Returns:
        The model.

    Raises:
        TypeError: names what was given in the place of a module.
        ValueError: a weight is offloaded by accelerate, or FSDP2 has the model in use; it is as it was.

    Examples:
        >>> import int8fx, torch
        >>> model = int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> int8fx.dequantize_(model)[0].weight.dtype
        torch.float32
    """
    check_module(model, "dequantize_")
    shards = _shards(model, "dequantize_")
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(local(weight), QuantizedWeight):
                if weight.is_meta and hasattr(module, "_hf_hook"):
                    raise ValueError(
                        f"dequantize_: a weight of shape {list(weight.shape)} is offloaded; bring it "
                        "back with accelerate.hooks.remove_hook_from_submodules(model) first"
                    )
                owners[id(weight)].append((module, name))
    for shared in owners.values():
        weight = getattr(*shared[0])
        floats = map_local(
            weight, lambda part: torch_private.out_of_inference_mode(part.dequantize(dtype))
        )
        parameter = nn.Parameter(floats, requires_grad=False)
        if id(weight) in shards:
            torch_private.replace_shard(shards[id(weight)], parameter)
        for module, name in shared:
            setattr(module, name, parameter)
            describe.forget(module)
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
            try:
                tell = getattr(importlib.import_module(integration), event)
            except ReleaseError as error:
                _warn_of_release(error, needed, model)
            else:
                tell(model, *args)


def _warn_of_release(error: ReleaseError, needed: str, model: nn.Module) -> None:
    base = getattr(sys.modules[needed], "PreTrainedModel", ())
    if any(isinstance(module, base) for module in model.modules()):
        warnings.warn(
            f"{error}: save_pretrained of {type(model).__name__} cannot write int8 files here, and "
            "int8fx.save_checkpoint can",
            UserWarning,
            stacklevel=4,
        )


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


# --- one weight ----------------------------------------------------------------------------------


def site_choice(site: Site, options: Options) -> Choice:
    """The scheme of a weight and its settings, the columns of a calibration among them.

    Raises:
        CalibrationError: the calibration is of another model, or the weight is cut along its columns.
    """
    N, K = site.rows_and_columns
    choice = options.calibrated(options.choice(site.path), site.path, (N, K))
    part = local(site.weight).shape
    if getattr(choice.settings, "columns", ()) and part[0 if site.transposed else -1] != K:
        raise CalibrationError(
            f"{site.path}: each process holds some of its {K} columns, and a calibration names columns "
            "of all: call int8fx.quantize_ before the model is sharded, or leave it in float (skip)"
        )
    return choice


def _quantized(site: Site, choice: Choice, shards: Mapping[int, Any]) -> nn.Parameter:
    # What FSDP2 cuts it puts together again: no process multiplies by its part.
    cut_by_fsdp = id(site.weight) in shards
    group = "" if cut_by_fsdp else row_parallel.group_of(site.weight, choice, site.transposed)

    def quantize(part: Tensor) -> QuantizedWeight:
        if group:
            return row_parallel.quantized(part, choice, site.transposed, group)
        return QuantizedWeight.from_float(part, transposed=site.transposed, **choice.options)

    return nn.Parameter(map_local(site.weight, quantize), requires_grad=False)
