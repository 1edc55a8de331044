"""The options of ``torch.compile(..., backend="llmint8", options={...})``, checked before use."""

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from int8fx.calibration import MOST_COLUMNS, Calibration
from int8fx.kernels.ops.quantize_reference import DECOMPOSITIONS
from int8fx.kernels.ops.rotation import ROTATIONS, allowed_blocks
from int8fx.kernels.schemes.scheme import CALIBRATED_COLUMNS, Choice, Settings
from int8fx.kernels.schemes.table import DEFAULT, SCHEMES

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
        threshold: an activation with ``|x| >= threshold`` is an outlier and stays in 16-bit; 0
            means no decomposition (plain vector-wise int8).
        decomposition: ``"column"`` or ``"token"``, see ``kernels/ops/quantize_reference.py``.
        scheme: how linears are quantised: a name of ``int8fx.SCHEMES``.
        rules: schemes by module path; the first that matches wins, and ``scheme`` is for the rest.
        group_size: how many weights along K share a scale, in schemes that quantise by groups.
        block, rotation: of ``int8-rotated``, see ``kernels/ops/rotation.py``.
        columns: how many columns of a linear's input stay in 16-bit, those that ``calibration`` says are
            largest; None: 8 with a calibration, else 0.
        calibration: a ``Calibration``, or the file of one.
        skip: fnmatch patterns on module paths that stay in float.
        only: when given, only module paths that match one of these are rewritten. What they name is
            rewritten even if it is a buffer that no linear owns, a low-rank factor, or has few columns.
        inductor: Inductor config patches, applied over those of ``mode``.
        attention: whether products of two activations (QKᵀ and PV of attention that is not fused) are
            in int8, too. Off by default, as in the paper.
        release_weights: whether modules give up their float weights once compiled (``release.py``).
        check_weights: whether each call compares samples of the float weights' content, on a CPU, with
            what was quantised: 1 to 2 % of a decode step. Without, a weight written behind torch's
            back (``.data.mul_()``, numpy, another process) keeps its old values until
            ``int8fx.refresh(model)``; in-place edits, ``.data =``, ``load_state_dict``, optimizers'
            steps and peft's merges are seen all the same.
        skips_by_default: whether a weight that is also an embedding stays in float, and what is
            ranked: with the default ``skip``, as the output head does.
        given: the names of those that the user gave; the others are defaults.
    """

    threshold: float = 6.0
    decomposition: str = "column"
    scheme: str = DEFAULT
    rules: tuple[Rule, ...] = ()
    group_size: int = 128
    block: int = 64
    rotation: str = "hadamard"
    columns: int | None = None
    calibration: Calibration | None = None
    skip: tuple[str, ...] = OUTPUT_HEADS
    only: tuple[str, ...] | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False
    release_weights: bool = False
    check_weights: bool = True
    skips_by_default: bool = True
    given: frozenset[str] = frozenset()

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any] | None,
        taker: str = "backend 'llmint8'",
        allowed: Collection[str] | None = None,
    ) -> "Options":
        """Options from the user's dict.

        Args:
            taker: whose options these are, for messages.
            allowed: the names of those that it takes; all by default.

        Raises:
            ValueError: names the option, what was given and what is allowed.
        """
        given = dict(given or {})
        allowed = _CHECKS if allowed is None else allowed
        for name in given:
            if name not in allowed:
                raise ValueError(
                    f"unknown option {name!r} for {taker}; allowed: {', '.join(sorted(allowed))}"
                )
        values = {
            name: _CHECKS[name](f"option {name!r} of {taker}", value) for name, value in given.items()
        }
        options = cls(**values, skips_by_default="skip" not in given, given=frozenset(given))
        if options.columns and options.calibration is None:
            raise _refuse(
                f"option 'columns' of {taker}", options.columns, "0 without the option 'calibration'"
            )
        return options

    def choice(self, path: str, kept: Mapping[str, Any] | None = None) -> Choice:
        """The scheme of a module, and its settings.

        Args:
            kept: settings that an int8 weight has from ``quantize_``: they go before the defaults, and
                behind what was given for this compile.
        """
        names = {setting.name for setting in fields(Settings)} - {"static_columns"}
        settings = {name: getattr(self, name) for name in names}
        settings |= {name: value for name, value in (kept or {}).items() if name not in self.given}
        rule = self.rule(path)
        if rule is None:
            return Choice(SCHEMES[self.scheme], Settings(**settings))
        return Choice(SCHEMES[rule.scheme], Settings(**settings | dict(rule.settings)))

    def calibrated(self, choice: Choice, path: str, shape: tuple[int, int]) -> Choice:
        """The choice with the columns that the calibration has for a linear.

        Args:
            shape: ``(N, K)`` of its weight.

        Raises:
            CalibrationError: the calibration is of another model.
        """
        if self.calibration is None or "columns" not in choice.scheme.reads:
            return choice
        count = choice.settings.columns
        count = CALIBRATED_COLUMNS if count is None else count
        columns = self.calibration.columns_of(path, shape, count)
        return Choice(choice.scheme, dataclasses.replace(choice.settings, static_columns=columns))

    def quantizes_head(self, path: str) -> bool:
        """Whether the default of ``skip`` leaves out the output head: it is calibrated."""
        choice = self.choice(path)
        return self.calibration is not None and "columns" in choice.scheme.reads

    def rule(self, path: str) -> Rule | None:
        """The rule that decides on a module's scheme."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(path, rule.pattern)), None)

    def unused(self, paths: Collection[str]) -> tuple[str, ...]:
        """The user's patterns that decide on none of these modules, as a person would name them."""
        # The default skip list is not the user's: most of its names are other models'.
        given = {"skip": () if self.skips_by_default else self.skip, "only": self.only or ()}
        named = [
            f"{option}: {pattern!r}"
            for option, patterns in given.items()
            for pattern in patterns
            if not fnmatch.filter(paths, pattern)
        ]
        used = {id(self.rule(path)) for path in paths}
        return (*named, *(f"rules: {rule}" for rule in self.rules if id(rule) not in used))


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


def _refuse(asked: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{asked}: given {value!r} ({type(value).__name__}); allowed: {allowed}")


def _threshold(asked: str, value: Any) -> float:
    allowed = "a number >= 0; 0 means no decomposition, float('inf') that nothing is an outlier"
    # bool is an int to isinstance, and threshold=True is a mistake. NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise _refuse(asked, value, allowed)
    return float(value)


def _decomposition(asked: str, value: Any) -> str:
    if value not in DECOMPOSITIONS:
        raise _refuse(asked, value, " or ".join(map(repr, DECOMPOSITIONS)))
    return value


def _scheme(asked: str, value: Any) -> str:
    if not isinstance(value, str) or value not in SCHEMES:
        raise _refuse(asked, value, ", ".join(map(repr, SCHEMES)))
    return value


def _rules(asked: str, value: Any) -> tuple[Rule, ...]:
    if not isinstance(value, (list, tuple)):
        raise _refuse(asked, value, _RULES)
    return tuple(_rule(asked, rule) for rule in value)


_RULES = (
    'a list of (pattern, scheme) or (pattern, scheme, settings), as [("*.mlp.*", "llm.int8"), '
    '("*", "absmax-vector")]'
)


def _rule(asked: str, value: Any) -> Rule:
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 3):
        raise _refuse(asked, value, _RULES)
    pattern, scheme, *rest = value
    settings = rest[0] if rest else {}
    if not isinstance(pattern, str) or not isinstance(settings, Mapping):
        raise _refuse(asked, value, _RULES)
    allowed = SCHEMES[_scheme(asked, scheme)].reads
    for setting in settings:
        if setting not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise _refuse(asked, value, f"settings that {scheme!r} reads: {known}")
    checked = {
        key: _CHECKS[key](f"{asked}, setting {key!r} of {scheme!r}", given)
        for key, given in settings.items()
    }
    return Rule(pattern, scheme, checked)


def _group_size(asked: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 16:
        raise _refuse(asked, value, "a multiple of 16")
    return value


def _block(asked: str, value: Any) -> int:
    allowed = allowed_blocks(ROTATIONS[0])
    if isinstance(value, bool) or value not in allowed:
        raise _refuse(asked, value, ", ".join(map(str, allowed)))
    return value


def _rotation(asked: str, value: Any) -> str:
    if not isinstance(value, str) or value not in ROTATIONS:
        raise _refuse(asked, value, ", ".join(map(repr, ROTATIONS)))
    return value


def _columns(asked: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_COLUMNS:
        raise _refuse(asked, value, f"a whole number from 0 to {MOST_COLUMNS}")
    return value


def _calibration(asked: str, value: Any) -> Calibration:
    if isinstance(value, Calibration):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise _refuse(asked, value, "a Calibration, as int8fx.calibrate makes it, or the file of one")
    return Calibration.load(value)


def _patterns(asked: str, value: Any) -> tuple[str, ...]:
    # A str is a sequence of str: ["lm_head"] was meant, and "lm_head" would match single letters.
    listed = isinstance(value, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(pattern, str) for pattern in value):
        raise _refuse(asked, value, 'a list of fnmatch patterns on module paths, as ["*.mlp.*"]')
    return tuple(value)


def _flag(asked: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(asked, value, "True or False")
    return value


def _patches(asked: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _refuse(asked, value, 'a dict of Inductor config patches, as {"max_autotune": True}')
    return dict(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "threshold": _threshold,
    "decomposition": _decomposition,
    "scheme": _scheme,
    "rules": _rules,
    "group_size": _group_size,
    "block": _block,
    "rotation": _rotation,
    "columns": _columns,
    "calibration": _calibration,
    "skip": _patterns,
    "only": _patterns,
    "inductor": _patches,
    "attention": _flag,
    "release_weights": _flag,
    "check_weights": _flag,
}
