"""``int8fx.suggest``: options for a model, from what each of its linears costs in accuracy.

Every linear is quantised alone, in the fastest way, and the KL divergence of the model's answers to
those in float is its sensitivity. For small errors that grows as the square of what is wrong with the
linear's output, which one run shows for all linears and all ways, so the other ways' divergences are
estimated from it. Divergences of single linears nearly add up, so a mixture is chosen by their sums,
scaled by what the last mixture really had, and measured in the end as the options that say it.

The way ``int8-rotated`` has the static columns of a calibration, which is made of the inputs where none
is given.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from int8fx.analysis.calibrate import calibrate
from int8fx.analysis.explanation.record import kind, mib
from int8fx.analysis.explanation.text import as_text
from int8fx.analysis.mixture import Mixtures, columns_for
from int8fx.calibration import Calibration
from int8fx.errors import BudgetError, CalibrationError

FLOAT = "float"
# From the fastest to the most accurate; all but the last take the same memory.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llm.int8": ("llm.int8", {}),
    "llm.int8 at 3": ("llm.int8", {"threshold": 3.0}),
    "int8-rotated": ("int8-rotated", {}),  # with a calibration
    "w8a16": ("w8a16", {}),
}
LADDER = (*WAYS, FLOAT)
FASTEST = LADDER[0]
BUDGETS = ("kl", "memory")


@dataclass(frozen=True)
class Sensitivity:
    """One linear: its divergence when it alone is quantised, by the way that it is.

    Attributes:
        path: of its module.
        kl: mean KL divergence to the float model, in nats: measured for the fastest way, estimated for
            the others that it has a product for, 0 in float.
        float_bytes, kept_bytes: of its weight.
        chosen: a key of ``kl``.
    """

    path: str
    kl: dict[str, float]
    float_bytes: int
    kept_bytes: int
    chosen: str

    @property
    def nbytes(self) -> int:
        return self.float_bytes if self.chosen == FLOAT else self.kept_bytes


@dataclass(frozen=True)
class Suggestion:
    """Options that keep a budget, and the table that justifies them.

    Attributes:
        options: for ``torch.compile(model, backend="llmint8", options=...)``. Where a linear is in
            ``int8-rotated`` they have a ``Calibration``, which can be saved.
        kl: of the model as the backend rewrites it with these options, measured on the inputs given.
        uniform_kl: the same of each way that all linears have, for all of them.
        model_bytes: of all parameters and buffers then, the float ones not counted that are quantised.
        linears: how each linear fared.
        columns_of_inputs: whether the calibration was made of the inputs, and not given.
    """

    options: dict[str, Any]
    kl: float
    uniform_kl: dict[str, float]
    model_bytes: int
    linears: tuple[Sensitivity, ...]
    columns_of_inputs: bool = False

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("KL x 1e6 of each linear alone", overflow="fold")
        for way in WAYS:
            table.add_column(way, justify="right", no_wrap=True)
        table.add_column("chosen", no_wrap=True)
        for each in self.linears:
            cells = (f"{each.kl[way] * 1e6:,.0f}" if way in each.kl else "" for way in WAYS)
            table.add_row(Text(each.path), *cells, each.chosen)
        uniform = ", ".join(f"{way} {kl:.5f}" for way, kl in self.uniform_kl.items())
        lines = [
            f"alone: {FASTEST} is measured, the others are estimated from their output's error",
            f"KL of the whole model: {self.kl:.5f}; every linear in one way: {uniform}",
            f"parameters and buffers: {mib(self.model_bytes)} MiB",
            f"options={self._shown()!r}",
        ]
        if "calibration" in self.options and self.columns_of_inputs:
            lines.append(
                "columns: those of the inputs above; suggestion.options['calibration'].save(...) and "
                "int8fx calibrate write a file of columns"
            )
        return Group(table, "", *map(Text, lines))

    def _shown(self) -> dict[str, Any]:
        """The options with the name of a file for a calibration, whose columns would fill the page."""
        has_one = "calibration" in self.options
        return self.options | ({"calibration": "calibration.json"} if has_one else {})

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it; a calibration as in its file."""
        content = asdict(self)
        if "calibration" in self.options:
            content["options"]["calibration"] = self.options["calibration"].to_dict()
        return content


def suggest(
    model: Callable[..., Any],
    inputs: Any,
    *,
    budget: Mapping[str, float],
    calibration: Calibration | str | os.PathLike[str] | None = None,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Suggestion:
    """Options for a model that keep a budget.

    With a budget of KL the mixture is the fastest that keeps it; with one of memory, the most
    accurate. The model runs about as often as it has linears, from each of them on, so a few hundred
    tokens are enough; it and its compiled forms stay as they are.

    Args:
        model: answers with logits ``[*, V]``, or with an object that has them as ``logits``.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budget: ``{"kl": nats}``, the mean divergence from the float model's answers, or ``{"memory":
            bytes}``, of all parameters and buffers.
        calibration: what ``int8fx.calibrate`` made of the model, or its file, for ``int8-rotated``. By
            default it is made of the inputs.
        on_run: told how many runs are done, and of how many: of each linear, of each way for all, and,
            as they are tried, of mixtures.

    Raises:
        ValueError: the budget is not one of these, or cannot be kept (``BudgetError``), or weights of
            the model are in int8 already; nothing was changed.
        TypeError: the model does not answer with logits.
        CalibrationError: the calibration is of another model, or no file of one.
    """
    _check(budget)
    from int8fx.torch_private import uncompiled
    from int8fx.weights.quantize import first_int8

    already = first_int8(uncompiled(model))
    if already:
        raise ValueError(
            f"{already} is in int8 already, and options are chosen by the distance from the float "
            "model: give that"
        )
    args, kwargs = _arguments(inputs)
    found = _calibration(calibration, model, kwargs or args)
    mixtures = Mixtures(model, args, kwargs, WAYS, found)
    runs = _Runs(mixtures, found, on_run)
    linears = _measure(mixtures, runs)
    uniform = {
        way: runs.kl_of(_of_way(way, found, mixtures.skipped))
        for way in WAYS
        if all(way in each.kl for each in linears)
    }
    if "kl" in budget:
        chosen, kl = _within_kl(linears, runs, uniform, float(budget["kl"]))
    else:
        chosen = _within_memory(linears, mixtures.float_bytes, float(budget["memory"]))
        kl = runs.kl_of_mixture(chosen)
    saved = sum(each.float_bytes - each.nbytes for each in chosen)
    options = _options(chosen, mixtures.skipped, found)
    size = mixtures.float_bytes - saved
    return Suggestion(options, kl, uniform, size, tuple(chosen), calibration is None)


def _calibration(given: Any, model: Callable[..., Any], batch: Any) -> Calibration:
    if isinstance(given, Calibration):
        return given
    if given is not None:
        return Calibration.load(given)
    try:
        return calibrate(model, [batch])
    except CalibrationError:  # the model has no linear, so none that would ask for its columns
        return Calibration(type(model).__name__, 0, ())


def _of_way(way: str, calibration: Calibration, skipped: Sequence[str]) -> dict[str, Any]:
    """Options that give a way to all linears; the head, which a calibration may let in, stays out."""
    scheme, settings = WAYS[way]
    columns = columns_for(scheme, calibration)
    return {"scheme": scheme, **settings, **columns} | (
        {"skip": list(skipped)} if columns and skipped else {}
    )


def _check(budget: Mapping[str, float]) -> None:
    allowed = 'allowed: {"kl": nats} or {"memory": bytes}, a number > 0'
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise ValueError(f"budget={budget!r}; {allowed}")
    (value,) = budget.values()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"budget={budget!r}; {allowed}")


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


class _Runs:
    """Runs of the model, counted."""

    def __init__(
        self, mixtures: Any, calibration: Calibration, on_run: Callable[[int, int], None]
    ) -> None:
        self._mixtures, self._calibration, self._on_run = mixtures, calibration, on_run
        self._done, self._total = 0, len(mixtures.paths) + len(WAYS)

    def alone(self, path: str) -> float:
        """The KL of one linear in the fastest way, all others in float."""
        return self._counted(self._mixtures.kl({path: FASTEST}))

    def kl_of(self, options: Mapping[str, Any]) -> float:
        """The KL of the model with these options."""
        return self._counted(self._mixtures.kl_of(options))

    def kl_of_mixture(self, linears: Sequence[Sensitivity]) -> float:
        """The same of the options that say what is chosen."""
        self._total += 1
        self._on_run(self._done, self._total)
        return self.kl_of(_options(linears, self._mixtures.skipped, self._calibration))

    def _counted(self, kl: float) -> float:
        self._done += 1
        self._on_run(self._done, self._total)
        return kl


def _measure(mixtures: Any, runs: _Runs) -> list[Sensitivity]:
    linears, noise = [], mixtures.noise()
    for path in mixtures.paths:
        measured = runs.alone(path)
        in_fastest = noise[path][FASTEST]
        kl = {
            way: measured * (each / in_fastest if in_fastest else 1)
            for way, each in noise[path].items()
        }
        float_bytes, kept_bytes = mixtures.nbytes(path)
        linears.append(Sensitivity(path, {**kl, FLOAT: 0.0}, float_bytes, kept_bytes, FLOAT))
    return linears


# --- a budget of KL -------------------------------------------------------------------------------


def _within_kl(
    linears: Sequence[Sensitivity], runs: _Runs, uniform: Mapping[str, float], budget: float
) -> tuple[list[Sensitivity], float]:
    """Everything in the fastest way, and then up the ladder where a step gains most for its price."""
    chosen = [_with(each, FASTEST) for each in linears]
    kl, target, least = uniform[FASTEST], budget, 1
    steps = _steps(chosen)
    while not kl <= budget and steps:
        # What the sum of the single divergences says, in the measure of what was measured.
        scale = kl / max(sum(each.kl[each.chosen] for each in chosen), 1e-12)
        taken = 0
        while steps and (
            taken < least or scale * sum(each.kl[each.chosen] for each in chosen) > target
        ):
            index, way = steps.pop(0)
            taken += 1
            if LADDER.index(way) > LADDER.index(chosen[index].chosen):
                chosen[index] = _with(chosen[index], way)
        kl = runs.kl_of_mixture(chosen)
        # Was the sum too hopeful? Aim lower; and where the single divergences are but rounding, and say
        # nothing, twice as many steps each time come to an end, too.
        target, least = 0.9 * target, 2 * least
    if not kl <= budget:
        raise BudgetError(f"budget={{'kl': {budget:g}}}: with every linear in float the KL is {kl:g}")
    return chosen, kl


def _steps(linears: Sequence[Sensitivity]) -> list[tuple[int, str]]:
    """Every step up the ladder, the best gain of KL for its price first.

    The price is the weight's size for each rung: a lower threshold makes more outliers, weights alone
    make the product slower, and float costs three bytes more for each weight.
    """
    ranked = [
        ((each.kl[FASTEST] - each.kl[way]) / (rung * each.kept_bytes), index, way)
        for index, each in enumerate(linears)
        for rung, way in enumerate(LADDER)
        if way != FASTEST and way in each.kl
    ]
    return [(index, way) for _, index, way in sorted(ranked, key=lambda step: -step[0])]


# --- a budget of memory ---------------------------------------------------------------------------


def _within_memory(
    linears: Sequence[Sensitivity], float_bytes: int, budget: float
) -> list[Sensitivity]:
    """The most accurate way in int8 for all, and float for the most sensitive while it fits."""
    chosen = [
        _with(each, min((each.kl[way], way) for way in WAYS if way in each.kl)[1]) for each in linears
    ]
    used = float_bytes - sum(each.float_bytes - each.kept_bytes for each in chosen)
    if used > budget:
        raise BudgetError(
            f"budget={{'memory': {budget:.0f}}}: with every linear in int8 the model takes {used} "
            f"bytes ({mib(used)} MiB), in float {float_bytes}"
        )
    gains = [
        (each.kl[each.chosen] / (each.float_bytes - each.kept_bytes), index)
        for index, each in enumerate(chosen)
        if each.float_bytes > each.kept_bytes
    ]
    for _, index in sorted(gains, reverse=True):
        more = chosen[index].float_bytes - chosen[index].kept_bytes
        if used + more <= budget:
            chosen[index] = _with(chosen[index], FLOAT)
            used += more
    return chosen


def _with(each: Sensitivity, way: str) -> Sensitivity:
    return Sensitivity(each.path, each.kl, each.float_bytes, each.kept_bytes, way)


# --- as options -----------------------------------------------------------------------------------


def _options(
    linears: Sequence[Sensitivity], skipped: Sequence[str], calibration: Calibration
) -> dict[str, Any]:
    """Rules and a skip list; linears of a kind that agree are one pattern."""
    by_kind: dict[str, set[str]] = {}
    for each in linears:
        by_kind.setdefault(kind(each.path), set()).add(each.chosen)
    ways: dict[str, str] = {}
    for each in linears:
        alike = len(by_kind[kind(each.path)]) == 1
        ways[kind(each.path) if alike else each.path] = each.chosen
    quantised = [way for way in ways.values() if way != FLOAT]
    usual = max(quantised, key=quantised.count, default=FASTEST)
    options: dict[str, Any] = {}
    if usual != FASTEST:
        options["scheme"] = WAYS[usual][0]
    # Settings stay in the rules: as options they would be those of every rule.
    rules = [(pattern, *WAYS[way]) for pattern, way in ways.items() if way not in (usual, FLOAT)]
    if WAYS[usual][1]:
        rules.append(("*", *WAYS[usual]))
    if rules:
        options["rules"] = rules
    for way in quantised:
        options |= columns_for(WAYS[way][0], calibration)
    in_float = [pattern for pattern, way in ways.items() if way == FLOAT]
    if in_float or (skipped and "calibration" in options):
        # A skip list takes the place of the default one. With a calibration that lets the head in.
        options["skip"] = [*skipped, *in_float]
    return options
