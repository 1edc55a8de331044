"""How to quantise, as every command that does so is told: the same options, which a decorator adds.

@takes_options
def explain(model: ModelArgument = None, *, asked: Asked, ...) -> None:
    options = asked.options()
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8fx.cli.arguments import (
    CalibrationOption,
    DecompositionOption,
    OnlyOption,
    OptionsFile,
    RuleOption,
    SchemesOption,
    SkipOption,
    ThresholdOption,
    backend_options,
    exists,
    rule,
)
from int8fx.errors import UserError

PARAMETERS: dict[str, Any] = {
    "scheme": SchemesOption,
    "rule": RuleOption,
    "threshold": ThresholdOption,
    "decomposition": DecompositionOption,
    "calibration": CalibrationOption,
    "skip": SkipOption,
    "only": OnlyOption,
    "options": OptionsFile,
}


@dataclass(frozen=True)
class Asked:
    """What was given of ``PARAMETERS``."""

    scheme: list[str] | None = None
    rule: list[str] | None = None
    threshold: float | None = None
    decomposition: str | None = None
    calibration: Path | None = None
    skip: list[str] | None = None
    only: list[str] | None = None
    options_file: Path | None = None

    def options(self, *left_out: str) -> dict[str, Any]:
        """As ``torch.compile(..., options=...)`` takes them.

        Args:
            left_out: names of options that the command has no use for.

        Raises:
            UserError: names the option, what was given and what is allowed.
        """
        schemes = self.scheme or [""]
        if len(schemes) > 1:
            raise UserError(f"--scheme was given {len(schemes)} times; this command takes one")
        return _checked({**self._common(left_out), **_scheme(schemes[0])}, schemes[0])

    def contenders(self, default: Sequence[str], *left_out: str) -> dict[str, dict[str, Any]]:
        """Options for each ``--scheme``, by what the user calls it; ``default`` where there is none.

        What is given beside them is for all that read it.

        Raises:
            UserError: as ``options``; or a setting that none of them reads.
        """
        from int8fx.kernels.schemes.table import DEFAULT

        common = self._common(left_out)
        if not self.scheme and self.options_file is not None:
            return {self.options_file.name: _checked(common, "")}
        specs = self.scheme or ([DEFAULT] if self.rule else default)
        return _for_each(specs, common)

    def ways(self) -> tuple[dict[str, tuple[str, dict[str, Any]]] | None, dict[str, Any]]:
        """Of ``int8fx.suggest``: a way for each ``--scheme``, or None, and the options beside them.

        Raises:
            UserError: as ``options``.
        """
        from int8fx.kernels.schemes.table import DEFAULT

        common = self._common(("scheme",))
        _for_each(self.scheme or [DEFAULT], common)
        ways = {}
        for spec in self.scheme or ():
            given = _scheme(spec)
            ways[spec] = (given.pop("scheme"), given)
        return ways or None, common

    def _common(self, left_out: Sequence[str]) -> dict[str, Any]:
        """All but ``--scheme``: those of the file, and the others before them."""
        from int8fx.options_file import load_options

        if self.calibration is not None:
            exists("--calibration", self.calibration)
        given = {
            name: getattr(self, name)
            for name in ("threshold", "decomposition", "calibration", "skip", "only")
            if getattr(self, name) is not None
        }
        rules = [rule(text) for text in self.rule or ()]
        try:
            of_file = {} if self.options_file is None else load_options(self.options_file)
        except OSError as error:
            raise UserError(f"--options {self.options_file}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"--options {error}") from error
        of_file = {name: value for name, value in of_file.items() if name not in left_out}
        if rules:
            given["rules"] = [*rules, *of_file.get("rules", ())]
        return {**of_file, **given}


def _scheme(spec: str) -> dict[str, Any]:
    from int8fx.spec import scheme_and_settings

    if not spec:
        return {}
    name, settings = scheme_and_settings(spec, "--scheme")
    return {"scheme": name, **settings}


def _checked(options: dict[str, Any], spec: str) -> dict[str, Any]:
    return backend_options(f"--scheme {spec}: " if spec else "", **options)


def _for_each(specs: Sequence[str], common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by the scheme: each with what it reads of those that are common to all."""
    found = {spec: _in_use({**common, **_scheme(spec)}, spec) for spec in specs}
    for name in common:
        if not any(name in options for options in found.values()):
            raise UserError(f"--{name} {common[name]}: none of {', '.join(found)} reads it")
    return found


def _in_use(options: dict[str, Any], spec: str) -> dict[str, Any]:
    """The same without the settings that the scheme does not read, nor those of the rules."""
    from int8fx.options import in_use

    _checked({name: options[name] for name in ("scheme", "rules") if name in options}, spec)
    try:
        read = in_use(options)
    except ValueError as error:
        raise UserError(f"--scheme {spec}: {error}") from error
    return _checked(read, spec)


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options above; it gets them as its argument ``asked``."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in PARAMETERS}
        given["options_file"] = given.pop("options")
        command(*args, asked=Asked(**given), **kwargs)

    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.name != "asked"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in PARAMETERS.items()
    ]
    wrapper: Any = run
    wrapper.__signature__ = signature.replace(parameters=[*own, *added])
    wrapper.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
    return run
