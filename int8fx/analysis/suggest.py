"""``int8fx.suggest``: options for a model, from what each of its linears costs in accuracy.

Every linear is quantised alone, in the fastest way, and the KL divergence of the model's answers to
those in float is its sensitivity. For small errors that grows as the square of what is wrong with the
linear's output, which one run shows for all linears and all ways, so the other ways' divergences are
estimated from it. Divergences of single linears nearly add up, so a mixture is chosen by their sums,
scaled by what the last mixture really had, and measured in the end as the options that say it.

The way ``int8-rotated`` has the static columns of a calibration, which is made of the inputs where none
is given.
"""

import html
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from int8fx.analysis.calibrate import calibrate
from int8fx.analysis.explanation.record import kind, mib
from int8fx.analysis.explanation.text import as_text
from int8fx.arguments import check_callable
from int8fx.calibration import Calibration
from int8fx.errors import BudgetError, CalibrationError
from int8fx.kernels.schemes.table import DEFAULT, SCHEMES
from int8fx.module_path import ModulePath
from int8fx.options import Options, as_dict, in_use, of_way
from int8fx.options_file import save_options

FLOAT = "float"
BREAKS_OF_A_WAY = re.compile(r"(?<=[-,])| (?=at )")
CALIBRATION_FILE = "calibration.json"
# From the fastest to the most accurate, all with weights of 8 bits.
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
        float_bytes, kept_bytes: of its weight, in float and in the fastest way.
        chosen: a key of ``kl``.
        way_bytes: of its weight in each way that takes another number of bytes than the fastest.
    """

    path: str
    kl: dict[str, float]
    float_bytes: int
    kept_bytes: int
    chosen: str
    way_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.bytes_of(self.chosen)

    def bytes_of(self, way: str) -> int:
        return self.float_bytes if way == FLOAT else self.way_bytes.get(way, self.kept_bytes)


@dataclass(frozen=True, repr=False)
class Suggestion:
    """Options that keep a budget, and the table that justifies them.

    Attributes:
        options: for ``torch.compile(model, backend="llmint8", options=...)``. Where a linear keeps
            columns they have a ``Calibration``.
        kl: of the model as the backend rewrites it with these options, measured on the inputs given.
        uniform_kl: the same of each way that all linears have, for all of them.
        model_bytes: of all parameters and buffers then, the float ones not counted that are quantised.
        linears: how each linear fared.
        columns_of_inputs: whether the calibration was made of the inputs, and not given.

    Examples:
        >>> import int8fx, torch
        >>> layers = torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64)
        >>> model = torch.nn.Sequential(*layers)
        >>> suggestion = int8fx.suggest(model, torch.randn(8, 64), budget={"kl": 0.5})
        >>> suggestion.options, [each.chosen for each in suggestion.linears]
        ({}, ['llm.int8', 'llm.int8'])
    """

    options: dict[str, Any]
    kl: float
    uniform_kl: dict[str, float]
    model_bytes: int
    linears: tuple[Sensitivity, ...]
    columns_of_inputs: bool = False

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        chosen = Counter(each.chosen for each in self.linears)
        counts = ", ".join(f"{count} in {way}" for way, count in chosen.most_common())
        options = shortened(repr(self._shown))
        return f"<Suggestion: {self._said[0]}\n {self._said[1]}; {counts}\n options={options}>"

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self._said)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self._headings)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows
        )
        options = html.escape(f"options={self._shown!r}")
        return (
            f"<ul>{lines}</ul><p><code>{options}</code></p><p>{html.escape(self._legend)}</p>"
            f"<table><tr>{head}</tr>{rows}</table>"
        )

    @property
    def _ways(self) -> list[str]:
        return list(dict.fromkeys(way for each in self.linears for way in each.kl if way != FLOAT))

    @property
    def _headings(self) -> list[str]:
        return ["module", *self._ways, "chosen"]

    @property
    def _legend(self) -> str:
        measured = next(iter(self._ways), FASTEST)
        return (
            f"KL x 1e6 of each linear alone; {measured} is measured, the others are estimated from "
            "their output's error"
        )

    @property
    def _rows(self) -> list[list[str]]:
        return [
            [
                each.path,
                *(_millionths(each.kl[way]) if way in each.kl else "" for way in self._ways),
                each.chosen,
            ]
            for each in self.linears
        ]

    @property
    def _said(self) -> list[str]:
        uniform = ", ".join(f"{way} {kl:.5f}" for way, kl in self.uniform_kl.items())
        columns = "columns kept in 16-bit: the largest of these inputs"
        return [
            f"KL of the whole model: {self.kl:.5f}; every linear in one way: {uniform}",
            f"parameters and buffers: {mib(self.model_bytes)} MiB",
            *([columns] if self.columns_of_inputs else []),
        ]

    @property
    def _shown(self) -> dict[str, Any]:
        """The options with the name of a file for a calibration, whose columns would fill the page."""
        has_one = "calibration" in self.options
        return self.options | ({"calibration": CALIBRATION_FILE} if has_one else {})

    def __rich__(self) -> RenderableType:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        name, *ways, chosen = self._headings
        table.add_column(name, overflow="fold")
        for way in ways:
            heading = BREAKS_OF_A_WAY.sub("\n", way)  # 80 columns have room for a module's path
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column(chosen, no_wrap=True)
        for row in self._rows:
            path, *cells = row
            table.add_row(ModulePath(path), *map(Text, cells))
        lines = [*self._said, f"options={self._shown!r}"]
        return Group(Text(self._legend), table, "", *map(Text, lines))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the options, for ``torch.compile(options=path)``, ``int8fx.load_options`` and every
        command (``--options``); and beside them their calibration, as ``calibration.json``."""
        if "calibration" in self.options:
            self.options["calibration"].save(Path(path).with_name(CALIBRATION_FILE))
        save_options(self._shown, path)

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
    options: Mapping[str, Any] | str | PathLike[str] | None = None,
    ways: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
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
        options: what is decided already, and stays so: ``rules``, ``skip``, ``only``, ``calibration``,
            and settings of schemes; or the file of them. The suggestion holds them as well. Without a
            calibration the columns of ``int8-rotated`` are the largest of the inputs.
        ways: in which a linear may run, the fastest first: a scheme and its settings, by a name of
            yours. They may have weights of different bits. By default ``WAYS``, of 8 bits.
        on_run: told how many runs are done, and of how many: of each linear, of each way for all, and,
            as they are tried, of mixtures.

    Raises:
        ValueError: the budget is not one of these, or cannot be kept (``BudgetError``), an option or a
            way is unknown, or weights of the model are in int8 already; nothing was changed.
        TypeError: the model does not answer with logits, or is no module and no function.

    Examples:
        >>> import int8fx, torch
        >>> layers = torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64)
        >>> model = torch.nn.Sequential(*layers)
        >>> suggestion = int8fx.suggest(model, torch.randn(8, 64), budget={"kl": 0.5})
        >>> suggestion.kl <= 0.5
        True
    """
    _check(budget)
    check_callable(model, "suggest")
    fixed = _fixed(options)
    found = _checked_ways(WAYS if ways is None else ways)
    from int8fx.analysis.mixture import Mixtures
    from int8fx.torch_private import uncompiled
    from int8fx.weights.quantize import first_int8

    already = first_int8(uncompiled(model))
    if already:
        raise ValueError(
            f"{already} is quantised already, and options are chosen by the distance from the float "
            "model: give that"
        )
    args, kwargs = _arguments(inputs)
    of_inputs = "calibration" not in fixed
    if of_inputs:
        fixed["calibration"] = _calibration(model, kwargs or args)
    mixtures = Mixtures(model, args, kwargs, found, fixed)
    runs = _Runs(mixtures, on_run, found, fixed)
    _check_fastest(next(iter(found)), mixtures)
    linears = _measure(mixtures, runs)
    uniform = {way: runs.kl_of_all(way) for way in found if all(way in each.kl for each in linears)}
    if "kl" in budget:
        try:
            chosen, kl = _within_kl(linears, runs, uniform, float(budget["kl"]), (*found, FLOAT))
        except BudgetError as error:
            ruled = "; those that the options have a rule for keep it" if mixtures.ruled_bytes else ""
            raise BudgetError(f"{error}{ruled}") from None
        chosen, kl = _simpler(chosen, kl, uniform, float(budget["kl"]), (*found, FLOAT))
    else:
        least = mixtures.float_bytes - mixtures.ruled_bytes
        chosen = _within_memory(linears, least, float(budget["memory"]), found)
        kl = runs.kl_of_mixture(chosen)
    saved = mixtures.ruled_bytes + sum(each.float_bytes - each.nbytes for each in chosen)
    options_found, size = runs.options_of(chosen), mixtures.float_bytes - saved
    of_inputs = of_inputs and "calibration" in options_found
    return Suggestion(options_found, kl, uniform, size, tuple(chosen), of_inputs)


def _millionths(kl: float) -> str:
    shown = f"{kl * 1e6:,.0f}"
    return "0" if shown == "-0" else shown  # rounding takes a divergence of nothing a little below it


def _calibration(model: Callable[..., Any], batch: Any) -> Calibration:
    try:
        return calibrate(model, [batch])
    except CalibrationError:  # the model has no linear, so none that would ask for its columns
        return Calibration(type(model).__name__, 0, ())


def _check_fastest(way: str, mixtures: Any) -> None:
    """Raises:
    ValueError: the fastest way, which is measured, has no product for some linear.
    """
    for path in mixtures.paths:
        if way not in mixtures.ways_of(path):
            raise ValueError(
                f"ways: {way!r}, the first, has no product for experts, as {path} is; give another"
            )


def _fixed(options: Mapping[str, Any] | str | PathLike[str] | None) -> dict[str, Any]:
    """What the user has decided, as options.

    Raises:
        ValueError: one is unknown, or none that suggest takes.
    """
    given = as_dict(options, "suggest")
    settings = {name for scheme in SCHEMES.values() for name in scheme.reads}
    taken = {"rules", "skip", "only", "calibration"} | settings
    for name in given:
        if name not in taken:
            allowed = ", ".join(sorted(taken))
            raise ValueError(f"option {name!r} of suggest; allowed: {allowed}")
    checked = Options.parse(in_use(given), "suggest")
    if not isinstance(given.get("calibration", checked.calibration), Calibration | None):
        given["calibration"] = Calibration.load(given["calibration"])
    return given


def _check(budget: Mapping[str, float]) -> None:
    allowed = 'allowed: {"kl": nats} or {"memory": bytes}, a number > 0'
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise ValueError(f"budget={budget!r}; {allowed}")
    (value,) = budget.values()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"budget={budget!r}; {allowed}")


def _checked_ways(ways: Any) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Raises:
    ValueError: they are no dict, or there are none, or one is no scheme with its settings.
    """
    pairs = ways.values() if isinstance(ways, Mapping) else ()
    if not pairs or not all(isinstance(each, tuple | list) and len(each) == 2 for each in pairs):
        raise ValueError(f"ways={ways!r}; allowed: one at least, as {{'mine': ('llm.int8', {{}})}}")
    return dict(ways)


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


class _Runs:
    """Runs of the model, counted."""

    def __init__(
        self,
        mixtures: Any,
        on_run: Callable[[int, int], None],
        ways: Mapping[str, tuple[str, Mapping[str, Any]]],
        fixed: Mapping[str, Any],
    ) -> None:
        self._mixtures, self._on_run, self._ways, self._fixed = mixtures, on_run, ways, fixed
        self._done, self._total = 0, len(mixtures.paths) + len(ways)

    def alone(self, path: str) -> float:
        """The KL of one linear in the fastest way, all others in float."""
        return self._counted(self._mixtures.kl({path: next(iter(self._ways))}))

    def kl_of_all(self, way: str) -> float:
        """The KL of the model with every linear in one way."""
        options = of_way(*self._ways[way], self._fixed)
        return self._counted(self._mixtures.kl_of(_without_head(options, self._mixtures.skipped)))

    def kl_of_mixture(self, linears: Sequence[Sensitivity]) -> float:
        """The same of the options that say what is chosen."""
        self._total += 1
        self._on_run(self._done, self._total)
        return self._counted(self._mixtures.kl_of(self.options_of(linears)))

    def options_of(self, linears: Sequence[Sensitivity]) -> dict[str, Any]:
        """Options that say what is chosen, and what was decided before."""
        return _options(linears, self._mixtures.skipped, self._ways, self._fixed)

    def _counted(self, kl: float) -> float:
        self._done += 1
        self._on_run(self._done, self._total)
        return kl


def _measure(mixtures: Any, runs: _Runs) -> list[Sensitivity]:
    linears, noise = [], mixtures.noise()
    for path in mixtures.paths:
        measured = runs.alone(path)
        in_fastest = next(iter(noise[path].values()))
        kl = {
            way: measured * (each / in_fastest if in_fastest else 1)
            for way, each in noise[path].items()
        }
        float_bytes, of_ways = mixtures.nbytes(path)
        least = next(iter(of_ways.values()))
        others = {way: nbytes for way, nbytes in of_ways.items() if nbytes != least}
        kl[FLOAT] = 0.0
        linears.append(Sensitivity(path, kl, float_bytes, least, FLOAT, others))
    return linears


# --- a budget of KL -------------------------------------------------------------------------------


def _within_kl(
    linears: Sequence[Sensitivity],
    runs: _Runs,
    uniform: Mapping[str, float],
    budget: float,
    ladder: Sequence[str] = LADDER,
) -> tuple[list[Sensitivity], float]:
    """Everything in the fastest way, and then up the ladder where a step gains most for its price."""
    chosen = [_with(each, ladder[0]) for each in linears]
    kl, target, least = uniform[ladder[0]], budget, 1
    steps = _steps(chosen, ladder)
    while not kl <= budget and steps:
        # What the sum of the single divergences says, in the measure of what was measured.
        scale = kl / max(sum(each.kl[each.chosen] for each in chosen), 1e-12)
        taken = 0
        while steps and (
            taken < least or scale * sum(each.kl[each.chosen] for each in chosen) > target
        ):
            index, way = steps.pop(0)
            taken += 1
            if ladder.index(way) > ladder.index(chosen[index].chosen):
                chosen[index] = _with(chosen[index], way)
        kl = runs.kl_of_mixture(chosen)
        # Was the sum too hopeful? Aim lower; and where the single divergences are but rounding, and say
        # nothing, twice as many steps each time come to an end, too.
        target, least = 0.9 * target, 2 * least
    if not kl <= budget:
        raise BudgetError(f"budget={{'kl': {budget:g}}}: with every linear in float the KL is {kl:g}")
    return chosen, kl


def _simpler(
    chosen: list[Sensitivity],
    kl: float,
    uniform: Mapping[str, float],
    budget: float,
    ladder: Sequence[str],
) -> tuple[list[Sensitivity], float]:
    """One way for all instead, where that keeps the budget, too, at a lower price."""
    for way, divergence in uniform.items():
        alike = [_with(each, way) for each in chosen]
        if divergence <= budget and _price(alike, ladder) < _price(chosen, ladder):
            return alike, divergence
    return chosen, kl


def _price(linears: Sequence[Sensitivity], ladder: Sequence[str]) -> int:
    """By the rungs of the ladder, as in ``_steps``, and by the memory above the fastest way's."""
    rungs = (ladder.index(each.chosen) * each.kept_bytes for each in linears)
    return sum(rungs) + sum(each.nbytes - each.kept_bytes for each in linears)


def _steps(linears: Sequence[Sensitivity], ladder: Sequence[str]) -> list[tuple[int, str]]:
    """Every step up the ladder, the best gain of KL for its price first.

    The price is the weight's size for each rung: a lower threshold makes more outliers, weights alone
    make the product slower, and float costs three bytes more for each weight.
    """
    ranked = [
        ((each.kl[ladder[0]] - each.kl[way]) / (rung * each.kept_bytes), index, way)
        for index, each in enumerate(linears)
        for rung, way in enumerate(ladder)
        if rung and way in each.kl
    ]
    return [(index, way) for _, index, way in sorted(ranked, key=lambda step: -step[0])]


# --- a budget of memory ---------------------------------------------------------------------------


def _within_memory(
    linears: Sequence[Sensitivity], float_bytes: int, budget: float, ways: Collection[str]
) -> list[Sensitivity]:
    """The smallest way for all, then more bits, or float, where a byte gains most, while it fits."""
    chosen = [_with(each, _smallest(each, ways)) for each in linears]
    used = float_bytes - sum(each.float_bytes - each.nbytes for each in chosen)
    if used > budget:
        raise BudgetError(
            f"budget={{'memory': {budget:.0f}}}: with every linear quantised the model takes {used} "
            f"bytes ({mib(used)} MiB), in float {float_bytes}; the ways are {', '.join(ways)}"
        )
    while step := _best_step(chosen, budget - used, (*ways, FLOAT)):
        index, way = step
        used += chosen[index].bytes_of(way) - chosen[index].nbytes
        chosen[index] = _with(chosen[index], way)
    return chosen


def _smallest(each: Sensitivity, ways: Collection[str]) -> str:
    """Of those that take the fewest bytes the most accurate."""
    return min((each.bytes_of(way), each.kl[way], way) for way in ways if way in each.kl)[2]


def _best_step(
    chosen: Sequence[Sensitivity], left: float, ways: Collection[str]
) -> tuple[int, str] | None:
    """The linear and its way of more bytes that gains most for each of them; None: none fits."""
    steps = [
        ((each.kl[each.chosen] - each.kl[way]) / more, index, way)
        for index, each in enumerate(chosen)
        for way in ways
        if way in each.kl
        and 0 < (more := each.bytes_of(way) - each.nbytes) <= left
        and each.kl[way] <= each.kl[each.chosen]
    ]
    return max(steps)[1:] if steps else None


def _with(each: Sensitivity, way: str) -> Sensitivity:
    return replace(each, chosen=way)


# --- as options -----------------------------------------------------------------------------------


def _options(
    linears: Sequence[Sensitivity],
    skipped: Sequence[str],
    ways: Mapping[str, tuple[str, Mapping[str, Any]]],
    fixed: Mapping[str, Any],
) -> dict[str, Any]:
    """Rules and a skip list; linears of a kind that agree are one pattern.

    Args:
        fixed: options that are decided already; their rules go first.
    """
    by_pattern = _by_pattern(linears)
    quantised = [way for way in by_pattern.values() if way != FLOAT]
    usual = max(quantised, key=quantised.count, default=next(iter(ways)))
    options = dict(fixed)
    scheme, settings = ways[usual]
    if scheme != DEFAULT:
        options["scheme"] = scheme
    # Settings stay in the rules: as options they would be those of every rule.
    rules = [
        (pattern, ways[way][0], dict(ways[way][1]))
        for pattern, way in by_pattern.items()
        if way not in (usual, FLOAT)
    ]
    if settings:
        rules.append(("*", scheme, dict(settings)))
    if rules:
        options["rules"] = [*fixed.get("rules", ()), *rules]
    in_float = [pattern for pattern, way in by_pattern.items() if way == FLOAT]
    if in_float:
        # A skip list takes the place of the default one.
        options["skip"] = [*skipped, *in_float]
    return _without_head(in_use(options), skipped)


def _without_head(options: dict[str, Any], skipped: Sequence[str]) -> dict[str, Any]:
    """What a calibration would let in, beside what was measured, stays out."""
    leaves = "calibration" in options and "skip" not in options and skipped
    return options | ({"skip": list(skipped)} if leaves else {})


def _by_pattern(linears: Sequence[Sensitivity]) -> dict[str, str]:
    """What is chosen, by patterns of modules: one for all layers where they agree."""
    by_kind: dict[str, set[str]] = {}
    for each in linears:
        by_kind.setdefault(kind(each.path), set()).add(each.chosen)
    found: dict[str, str] = {}
    for each in linears:
        alike = len(by_kind[kind(each.path)]) == 1
        found[kind(each.path) if alike else each.path] = each.chosen
    return found


def shortened(text: str, width: int = 200) -> str:
    return text if len(text) <= width else f"{text[:width]}..."
