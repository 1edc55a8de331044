"""The options of ``torch.compile(..., backend="llmint8", options={...})``, checked before use."""

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from int8fx.calibration import Calibration
from int8fx.kernels.schemes.scheme import Choice, Scheme
from int8fx.kernels.schemes.settings import checked_setting, checks_of, not_allowed
from int8fx.kernels.schemes.static_columns import CALIBRATED_COLUMNS
from int8fx.kernels.schemes.table import DEFAULT, SCHEMES
from int8fx.options_file import load_options

# The output head decides the next token directly and is a small share of the work: bitsandbytes
# leaves it in float, and so do we. These are the names that transformers' models give it; a weight
# tied to an embedding is recognised as a head without its name (``passes/linears/select.py``).
OUTPUT_HEADS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "output_projection")

# Inductor's own, unless the user patches them. The assertions on each buffer's sizes check what the
# fake implementations promise; the tests check that once and for all, and a decode step of a small
# linear would spend 5 of its 50 microseconds on them.
INDUCTOR_DEFAULTS = {"size_asserts": False}

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Rule:
    """The scheme of the modules whose path matches a pattern.

    Attributes:
        pattern: fnmatch, on module paths.
        scheme: a name of ``int8fx.SCHEMES``.
        settings: what differs from the options for these modules, as ``{"threshold": 3.0}``.
    """

    pattern: str
    scheme: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        return f"{self.pattern!r}: {self.scheme}{settings}"


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    Attributes:
        scheme: how linears are quantised: a name of ``int8fx.SCHEMES``.
        settings: those that were given of the settings of ``scheme``, or of a rule's scheme. Each is an
            option by its own name, as ``threshold``; what a scheme has is its ``settings``.
        rules: schemes by module path; the first that matches wins, and ``scheme`` is for the rest.
        skip: fnmatch patterns on module paths that stay in float. A list of yours replaces the default;
            one whose patterns all begin with ``+`` is added to it, as ``["+*.down_proj"]``.
        only: when given, only module paths that match one of these are rewritten. What they name is
            rewritten even if it is a buffer that no linear owns, a low-rank factor, or has few columns.
        calibration: which columns of each linear's input schemes with ``columns`` keep in 16-bit: a
            ``Calibration``, or the file of one. ``columns`` is how many of them, by default 8.
        inductor: Inductor config patches, applied over those of ``mode``.
        attention: whether products of two activations (QKᵀ and PV of attention that is not fused) are
            in int8, too. Off by default, as in the paper.
        release_weights: whether modules give up their float weights once compiled (``release.py``).
        check_weights: whether each call compares samples of the float weights' content, on a CPU, with
            what was quantised: 1 to 2 % of a decode step. Without, a weight written behind torch's
            back (``.data.mul_()``, numpy, another process) keeps its old values until
            ``int8fx.refresh(model)``; in-place edits, ``.data =``, ``load_state_dict``, optimizers'
            steps and peft's merges are seen all the same.
        background: whether graphs run operator by operator while Inductor compiles them in a process
            of its own (``compiler/background.py``). Others are compiled at once; the log says why.
        dump_graphs: a folder for each graph before and after each pass (``compiler/graphs.py``); None:
            nothing is written.
        skips_by_default: whether a weight that is also an embedding stays in float, and what is
            ranked: with the default ``skip``, as the output head does.
        given: the names of those that the user gave; the others are defaults.

    Examples:
        >>> import int8fx
        >>> options = int8fx.Options.parse({"threshold": 3.0, "skip": ["+*.down_proj"]})
        >>> options.threshold, options.skip[-1]
        (3.0, '*.down_proj')
        >>> int8fx.Options.parse({"treshold": 3.0})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: unknown option 'treshold' for backend 'llmint8'; allowed: attention, ...
    """

    scheme: str = DEFAULT
    settings: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    skip: tuple[str, ...] = OUTPUT_HEADS
    only: tuple[str, ...] | None = None
    calibration: Calibration | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False
    release_weights: bool = False
    check_weights: bool = True
    background: bool = False
    dump_graphs: Path | None = None
    skips_by_default: bool = True
    given: frozenset[str] = frozenset()

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any] | str | PathLike[str] | None,
        taker: str = "backend 'llmint8'",
        allowed: Collection[str] | None = None,
    ) -> "Options":
        """Options from the user's dict, or from the file of one (``int8fx.load_options``).

        Args:
            taker: whose options these are, for messages.
            allowed: the names of those that it takes, settings of schemes apart; all by default.

        Raises:
            ValueError: names the option, what was given and what is allowed.
        """
        given = as_dict(given, taker)
        allowed = _CHECKS if allowed is None else allowed
        values = {
            name: _CHECKS[name](f"option {name!r} of {taker}", given[name])
            for name in given
            if name in allowed
        }
        used = [SCHEMES[name] for name in _schemes_of(values)]
        settings = {
            name: _setting(name, value, used, taker, allowed)
            for name, value in given.items()
            if name not in allowed
        }
        skips = "skip" not in given or _adds(values["skip"])
        if skips and "skip" in values:
            values["skip"] = (*OUTPUT_HEADS, *(pattern[1:] for pattern in values["skip"]))
        options = cls(**values, settings=settings, skips_by_default=skips, given=frozenset(given))
        options._check_columns(taker)
        return options

    def _check_columns(self, taker: str) -> None:
        """Raises:
        ValueError: a number of columns is given, and no calibration that says which; or a calibration,
            and no scheme that keeps columns.
        """
        rules = [(rule.scheme, {**self.settings, **rule.settings}) for rule in self.rules]
        used = [(self.scheme, self.settings), *rules]
        keeps = any(_keeps_columns(SCHEMES[scheme], settings) for scheme, settings in used)
        if self.calibration is not None and not keeps:
            raise ValueError(
                f"option 'calibration' of {taker}: {', '.join(scheme for scheme, _ in used)} keeps no "
                "columns; allowed with scheme='int8-rotated', scheme='w4a8-group' and with "
                "decomposition='static'"
            )
        for _, settings in used:
            columns = settings.get("columns")
            if self.calibration is None and isinstance(columns, int):
                asked = f"setting 'columns' of {taker}"
                raise not_allowed(
                    asked, columns, "0 or column numbers, without the option 'calibration'"
                )

    @property
    def threshold(self) -> float:
        """Of outliers, where a scheme has them."""
        return self.settings.get("threshold", SCHEMES[DEFAULT].choice().settings.threshold)

    def choice(self, path: str, own: Choice | None = None) -> Choice:
        """The scheme of a module, and its settings.

        Args:
            own: the one that a quantised weight has from ``quantize_``: it goes before the defaults,
                and behind what was given for this compile.
        """
        rule = self.rule(path)
        if rule is not None:
            return self.settled(SCHEMES[rule.scheme], path, own)
        if own is not None and "scheme" not in self.given:
            return self.settled(own.scheme, path, own)
        return self.settled(SCHEMES[self.scheme], path, own)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every scheme that a module may have, with its settings: those of the rules, and the other."""
        return (*(self._chosen(rule) for rule in self.rules), self.chosen)

    @property
    def chosen(self) -> Choice:
        """That of the modules that no rule names."""
        return self._chosen(None)

    def _chosen(self, rule: Rule | None) -> Choice:
        return self._settled(SCHEMES[self.scheme if rule is None else rule.scheme], rule, None)

    def settled(self, scheme: Scheme, path: str, own: Choice | None) -> Choice:
        """A scheme with the settings that a module has for it."""
        return self._settled(scheme, self.rule(path), own)

    def _settled(self, scheme: Scheme, rule: Rule | None, own: Choice | None) -> Choice:
        settings = {} if own is None else asdict(own.settings)
        given = {**self.settings, **({} if rule is None else rule.settings)}
        # How many columns is asked of the calibration; which ones is a setting.
        settings |= {name: value for name, value in given.items() if not _is_count(name, value)}
        return scheme.choice(**{name: settings[name] for name in settings if name in scheme.reads})

    def calibrated(self, choice: Choice, path: str, shape: tuple[int, int]) -> Choice:
        """The choice with the columns that the calibration has for a linear of a float weight.

        Args:
            shape: ``(N, K)`` of its weight.

        Raises:
            CalibrationError: the calibration is of another model.
        """
        keeps = getattr(choice.settings, "keeps_columns", False)
        if self.calibration is None or not keeps or choice.settings.columns:
            return choice
        rule = self.rule(path)
        given = {**self.settings, **({} if rule is None else rule.settings)}
        count = given.get("columns")
        if isinstance(count, tuple):
            return choice
        columns = self.calibration.columns_of(
            path, shape, CALIBRATED_COLUMNS if count is None else count
        )
        return Choice(choice.scheme, dataclasses.replace(choice.settings, columns=columns))

    def quantizes_head(self, path: str) -> bool:
        """Whether the default of ``skip`` leaves out the output head: its scheme has columns for it."""
        settings = self.choice(path).settings
        return self.calibration is not None and getattr(settings, "quantizes_head", False)

    def rule(self, path: str) -> Rule | None:
        """The rule that decides on a module's scheme."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(path, rule.pattern)), None)

    def unused(self, paths: Collection[str]) -> tuple[str, ...]:
        """The user's patterns that decide on none of these modules, as a person would name them."""
        named = [
            f"{option}: {pattern!r}"
            for option, pattern in self._named_patterns
            if not fnmatch.filter(paths, pattern)
        ]
        used = {id(self.rule(path)) for path in paths}
        return (*named, *(f"rules: {rule}" for rule in self.rules if id(rule) not in used))

    @property
    def patterns(self) -> tuple[tuple[str, str], ...]:
        """The user's patterns, each behind the name of its option."""
        return (*self._named_patterns, *(("rules", rule.pattern) for rule in self.rules))

    @property
    def _named_patterns(self) -> list[tuple[str, str]]:
        # The default list is not the user's, written out or not: most of its names are other models'.
        default = OUTPUT_HEADS if set(self.skip).issuperset(OUTPUT_HEADS) else ()
        skip = [("skip", pattern) for pattern in self.skip if pattern not in default]
        return [*skip, *(("only", pattern) for pattern in self.only or ())]


def in_use(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the settings that no scheme in use reads: of what is asked of several schemes.

    Raises:
        ValueError: a rule, or the scheme, is not one.
    """
    values = {"scheme": given.get("scheme", DEFAULT), "rules": given.get("rules", ())}
    for name, value in values.items():
        values[name] = _CHECKS[name](f"option {name!r}", value)
    used = [SCHEMES[name] for name in _schemes_of(values)]
    read = {
        name: value
        for name, value in given.items()
        if name in _CHECKS or any(name in scheme.reads for scheme in used)
    }
    if not any("columns" in scheme.reads and _keeps_columns(scheme, read) for scheme in used):
        read.pop("calibration", None)
    return read


def of_way(scheme: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model whose linears all have one scheme, but for what other options decide."""
    return in_use({**options, **settings, "scheme": scheme})


def inductor_patches(mode: str | None, options: Options) -> dict[str, Any]:
    """Inductor's config patches for a torch.compile mode, with the user's own over them.

    Raises:
        ValueError: names the mode or the config entry, what was given and what is allowed.
    """
    from int8fx.torch_private import inductor_config, list_mode_options

    mode = mode or "default"
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; allowed: {', '.join(MODES)}")
    patches = {**INDUCTOR_DEFAULTS, **list_mode_options(mode), **options.inductor}
    known = inductor_config()
    for name in options.inductor:
        if name not in known:
            raise ValueError(f"option 'inductor': {name!r} is not an entry of torch._inductor.config")
    return patches


# The checks of ``_CHECKS``. ``asked`` names the option and whose it is, for messages.


def as_dict(given: Any, taker: str) -> dict[str, Any]:
    """Options as a dict, those of a file among them.

    Raises:
        ValueError: it is neither; names whose options they are.
    """
    if isinstance(given, (str, PathLike)):
        return load_options(given)
    if given is not None and not isinstance(given, Mapping):
        raise not_allowed(
            f"options of {taker}", given, 'a dict, as {"threshold": 3.0}, or a file of one'
        )
    return dict(given or {})


def _scheme(asked: str, value: Any) -> str:
    if not isinstance(value, str) or value not in SCHEMES:
        raise not_allowed(asked, value, ", ".join(map(repr, SCHEMES)))
    return value


def _rules(asked: str, value: Any) -> tuple[Rule, ...]:
    if not isinstance(value, (list, tuple)):
        raise not_allowed(asked, value, _RULES)
    return tuple(_rule(asked, rule) for rule in value)


_RULES = (
    'a list of (pattern, scheme) or (pattern, scheme, settings), as [("*.mlp.*", "llm.int8"), '
    '("*", "absmax-vector")]'
)


def _rule(asked: str, value: Any) -> Rule:
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 3):
        raise not_allowed(asked, value, _RULES)
    pattern, scheme, *rest = value
    settings = rest[0] if rest else {}
    if not isinstance(pattern, str) or not isinstance(settings, Mapping):
        raise not_allowed(asked, value, _RULES)
    checks = checks_of(SCHEMES[_scheme(asked, scheme)].settings)
    for name in settings:
        if name not in checks:
            known = ", ".join(sorted(checks)) or "none"
            raise not_allowed(asked, value, f"settings that {scheme!r} reads: {known}")
    checked = {
        name: checked_setting(f"{asked}, setting {name!r} of {scheme!r}", given, checks[name])
        for name, given in settings.items()
    }
    return Rule(pattern, scheme, checked)


def _schemes_of(values: Mapping[str, Any]) -> list[str]:
    """The names of the schemes that some options use."""
    return [values.get("scheme", DEFAULT), *(rule.scheme for rule in values.get("rules", ()))]


def _setting(
    name: str, value: Any, used: Collection[Scheme], taker: str, allowed: Collection[str]
) -> Any:
    """A setting of the schemes in use, checked by each that has it.

    Raises:
        ValueError: none has it, or it refuses the value.
    """
    owners = [scheme for scheme in used if name in scheme.reads]
    others = [scheme for scheme in SCHEMES.values() if name in scheme.reads]
    if not others:
        known = sorted({*allowed, *(each for scheme in used for each in scheme.reads)})
        raise ValueError(f"unknown option {name!r} for {taker}; allowed: {', '.join(known)}")
    asked = f"option {name!r} of {taker}"
    for scheme in owners or others[:1]:
        value = checked_setting(asked, value, checks_of(scheme.settings)[name])
    if not owners:
        names = ", ".join(repr(scheme.name) for scheme in used)
        known = sorted({each for scheme in used for each in scheme.reads})
        raise not_allowed(asked, value, f"settings that {names} reads: {', '.join(known) or 'none'}")
    return value


def _keeps_columns(scheme: Scheme, settings: Mapping[str, Any]) -> bool:
    given = {name: settings[name] for name in settings if name in scheme.reads}
    chosen = scheme.choice(**{name: given[name] for name in given if not _is_count(name, given[name])})
    return getattr(chosen.settings, "keeps_columns", False)


def _is_count(name: str, value: Any) -> bool:
    return name == "columns" and not isinstance(value, tuple)


def _calibration(asked: str, value: Any) -> Calibration:
    if isinstance(value, Calibration):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise not_allowed(
            asked, value, "a Calibration, as int8fx.calibrate makes it, or the file of one"
        )
    return Calibration.load(value)


def _patterns(asked: str, value: Any) -> tuple[str, ...]:
    # A str is a sequence of str: ["lm_head"] was meant, and "lm_head" would match single letters.
    listed = isinstance(value, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(pattern, str) for pattern in value):
        raise not_allowed(asked, value, 'a list of fnmatch patterns on module paths, as ["*.mlp.*"]')
    return tuple(value)


def _skip(asked: str, value: Any) -> tuple[str, ...]:
    patterns = _patterns(asked, value)
    if not _adds(patterns) and any(pattern.startswith("+") for pattern in patterns):
        raise not_allowed(
            asked,
            value,
            "patterns in place of the default ones, or patterns that all begin with '+' and are added "
            "to those",
        )
    return patterns


def _adds(skip: Collection[str]) -> bool:
    """Whether a skip list is added to the default one."""
    return bool(skip) and all(pattern.startswith("+") for pattern in skip)


def _flag(asked: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise not_allowed(asked, value, "True or False")
    return value


def _folder(asked: str, value: Any) -> Path | None:
    allowed = "a path of a folder, which is made if it is not there, or None"
    if value is None:
        return None
    if not isinstance(value, str | PathLike) or not str(value):
        raise not_allowed(asked, value, allowed)
    folder = Path(value)
    if folder.exists() and not folder.is_dir():
        raise not_allowed(asked, value, allowed)
    return folder


def _patches(asked: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise not_allowed(asked, value, 'a dict of Inductor config patches, as {"max_autotune": True}')
    return dict(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "scheme": _scheme,
    "rules": _rules,
    "skip": _skip,
    "only": _patterns,
    "calibration": _calibration,
    "inductor": _patches,
    "attention": _flag,
    "release_weights": _flag,
    "check_weights": _flag,
    "background": _flag,
    "dump_graphs": _folder,
}
