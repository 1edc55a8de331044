"""Quantisation-aware training: linears compute as a scheme does, and float weights are trained."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from int8fx.arguments import AnyModule, check_module
from int8fx.near import warn_of_unused
from int8fx.options import Options
from int8fx.weights.distributed import local
from int8fx.weights.expert_sites import expert_sites
from int8fx.weights.qat_linear import PreparedLinear, attributes_of, prepare, take_back
from int8fx.weights.quantize import OPTIONS, quantize_, site_choice
from int8fx.weights.sites import Site, by_weight, sites_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from int8fx.option_names import QuantizeOptions


_GIVEN = "_int8fx_qat"  # of the model that was prepared: the options


def prepare_qat_(model: AnyModule, **options: "Unpack[QuantizeOptions]") -> AnyModule:
    """Makes a model's linears compute as a scheme does, and trains their float weights through it.

    Each call quantises the weights, and the activations where the scheme does, and multiplies by the
    scheme's own product: the output is bit for bit that of the model which ``convert_qat_`` gives. The
    gradients are straight-through, ``grad @ ŵ`` for the input, ``gradᵀ @ x̂`` for the weight. The model
    keeps its parameters and their names. It trains eagerly and compiled; a compile has one call for
    each of these linears, and ``backend="llmint8"`` leaves them as they are, with that as the reason.

    Args:
        model: in float, on any device. Its weights are whole: a model is prepared before it is sharded.
        options: those of ``int8fx.quantize_`` but for ``method``: ``scheme``, its settings, ``rules``,
            ``skip``, ``only`` and ``calibration``. The same linears are prepared as it would quantise.

    Returns:
        The model.

    Examples:
        >>> import int8fx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> int8fx.prepare_qat_(model, scheme="w4a8-group")
        Sequential(
          (0): QatLinear(in_features=64, out_features=32, bias=True, trained in w4a8-group)
        )
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> int8fx.convert_qat_(model)[0].weight.choice.scheme.name
        'w4a8-group'

    Raises:
        TypeError: names what was given in the place of a module.
        ValueError: an option is unknown or out of range, a linear is prepared already, no weight of the
            model can be quantised, or a weight is sharded. The model is as it was.
    """
    check_module(model, "prepare_qat_")
    prepared = _prepared(model)
    if prepared:
        raise ValueError(
            f"prepare_qat_: {_named(model, prepared[0])} of {type(model).__name__} is prepared "
            "already; int8fx.convert_qat_(model) quantises what it is"
        )
    checked = Options.parse(options, "prepare_qat_", OPTIONS)
    groups = by_weight(sites := sites_of(model, checked))
    if not groups:
        reasons = "".join(f"\n  {site.decision}" for site in sites)
        raise ValueError(f"prepare_qat_ found no weight to train in {type(model).__name__}{reasons}")
    _check_whole(groups)
    # What may raise comes before the first change. Modules that share a weight share its choice.
    chosen = [(shared, site_choice(shared[0], checked)) for shared in groups]
    for shared, choice in chosen:
        for site in shared:
            prepare(site.module, attributes_of(choice, site.transposed))
    model.__dict__[_GIVEN] = dict(options)
    warn_of_unused(checked, model, stacklevel=2)
    _warn_of_experts(model, checked)
    return model


def convert_qat_(model: AnyModule) -> AnyModule:
    """Quantises the weights that were trained after ``prepare_qat_``, in place.

    The result is what ``int8fx.quantize_`` with the same options gives of a float model with these
    weights, bit for bit, its ``state_dict`` and its files included.

    Args:
        model: the one that ``prepare_qat_`` was given, or a copy of it.

    Returns:
        The model.

    Examples:
        >>> import int8fx, torch
        >>> model = int8fx.prepare_qat_(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> x = torch.randn(2, 64)
        >>> trained = model(x)
        >>> torch.equal(int8fx.convert_qat_(model)(x), trained)
        True

    Raises:
        TypeError: names what was given in the place of a module.
        ValueError: the model was not prepared, or a part or the whole of another that was; or its
            weights are sharded. The model is as it was.
    """
    check_module(model, "convert_qat_")
    options: Any = model.__dict__.get(_GIVEN)
    prepared = _prepared(model)
    if options is None or not prepared:
        raise ValueError(_not_prepared(model, prepared))
    strangers = [each for each in prepared if type(each).__bases__[0] is not PreparedLinear]
    if strangers:
        raise ValueError(
            f"convert_qat_: {_named(model, strangers[0])} has the class {type(strangers[0]).__name__}, "
            "which something made of the prepared one: convert the model before it is wrapped"
        )
    taken = [(module, take_back(module)) for module in prepared]
    try:
        quantize_(model, **options)
    except ValueError:  # it left the model as it was
        for module, attributes in taken:
            prepare(module, attributes)
        raise
    del model.__dict__[_GIVEN]
    return model


def _warn_of_experts(model: nn.Module, options: Options) -> None:
    found = [site.path for site in expert_sites(model, options) if not site.reason]
    if found:
        warnings.warn(
            f"prepare_qat_ leaves the experts of {type(model).__name__} as they are, {found[0]} among "
            'them: they are trained in float, and convert_qat_ quantises them. skip=["+*.experts.*"] '
            "leaves them in float",
            UserWarning,
            stacklevel=3,
        )


def _prepared(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PreparedLinear)]


def _named(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted) or "the module"


def _not_prepared(model: nn.Module, prepared: list[nn.Module]) -> str:
    kind = type(model).__name__
    inside = [path for path, module in model.named_modules() if _GIVEN in module.__dict__]
    if inside:
        return f"convert_qat_: {kind} was not prepared, but its module {inside[0]!r} was: convert that"
    if prepared:
        return f"convert_qat_: {kind} is a part of what prepare_qat_ was given: convert that model"
    return f"convert_qat_: {kind} was not prepared; int8fx.prepare_qat_(model, scheme=...) comes first"


def _check_whole(groups: list[list[Site]]) -> None:
    """Raises:
    ValueError: a weight is a DTensor.
    """
    for shared in groups:
        if local(shared[0].weight) is not shared[0].weight:
            raise ValueError(
                f"prepare_qat_: the weight of {shared[0].path} is sharded; prepare it before that"
            )
