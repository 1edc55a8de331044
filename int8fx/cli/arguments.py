"""What every command shares: errors in one line, exit codes, checked numbers, JSON on request."""

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from int8fx.errors import UserError

FAILED = 1
INTERRUPTED = 130  # as shells count it: 128 + SIGINT

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


def complain(message: str, code: int = FAILED) -> int:
    """Prints an error; its exit code."""
    print(f"int8fx: {message}", file=sys.stderr)
    return code


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command that takes ``debug`` end in one line when it fails, or in the traceback."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(complain("interrupted", INTERRUPTED)) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            raise typer.Exit(complain(_one_line(error))) from None

    return run


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
        return 'a model needs transformers: install with  python -m pip install "int8fx[transformers]"'
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


# Typer's own checks of numbers would not say what was given.


def positive(given: str | int) -> int:
    """A count."""
    try:
        count = int(given)
    except ValueError:
        count = 0
    if count < 1:
        raise typer.BadParameter(f"given {given!r}; allowed are whole numbers from 1")
    return count


def whole(given: str | int) -> int:
    try:
        return int(given)
    except ValueError:
        raise typer.BadParameter(f"given {given!r}; allowed are whole numbers") from None


def number(given: str | float) -> float:
    try:
        return float(given)
    except ValueError:
        raise typer.BadParameter(f"given {given!r}; allowed are numbers") from None


def above_zero(option: str, given: float | None) -> None:
    """Raises:
    UserError: names the option, what was given and what is allowed.
    """
    if given is not None and not 0 < given < float("inf"):
        raise UserError(f"{option} {given:g}: allowed is a number > 0")


def writable(option: str, given: Path | None) -> None:
    """Before the work that a file is for, not after it.

    Raises:
        UserError: the file's directory is not there.
    """
    if given is not None and not given.absolute().parent.is_dir():
        raise UserError(f"{option} {given}: there is no directory {given.absolute().parent}")


def ending(option: str, given: Path | None, *allowed: str) -> None:
    """Raises:
    UserError: the file's name does not end as its content asks for.
    """
    if given is not None and given.suffix.lower() not in allowed:
        raise UserError(f"{option} {given}: allowed are names that end in {', '.join(allowed)}")


def absent(argument: str, given: Path) -> None:
    """Raises:
    UserError: something is there already.
    """
    if given.exists():
        raise UserError(f"{argument} {given} is there already; give a directory that is not")


def exists(argument: str, given: Path) -> None:
    """Raises:
    UserError: nothing is there.
    """
    if not given.exists():
        raise UserError(f"{argument} {given}: no such file or directory")


def numbers(option: str, given: str, separator: str, count: int | None = None) -> list[int]:
    """Counts in one text, as ``4096x4096``.

    Raises:
        UserError: names the option, what was given and what is allowed.
    """
    parts = given.split(separator)
    if all(part.isdecimal() and int(part) > 0 for part in parts) and count in (None, len(parts)):
        return [int(part) for part in parts]
    form = separator.join(["N"] * (count or 1)) + ("" if count else f"{separator}...")
    raise UserError(f"{option} {given}: allowed is {form}, whole numbers from 1")


def print_json(values: Any) -> None:
    """Plain JSON: no NaN, no infinity."""
    print(json.dumps(values, indent=2, allow_nan=False))


def rule(given: str) -> tuple[str, str, dict[str, Any]]:
    """``PATTERN=SCHEME[,SETTING=VALUE...]`` of the command line as a rule of the options.

    Raises:
        UserError: there is no ``=`` in it, or the scheme has no such setting.
    """
    from int8fx.spec import scheme_and_settings

    pattern, separator, spec = given.partition("=")
    if not separator or not spec:
        raise UserError(
            f"--rule {given!r}: allowed is PATTERN=SCHEME, as '*.mlp.*=llm.int8', with settings as "
            "'*.mlp.*=llm.int8,threshold=3'"
        )
    return (pattern, *scheme_and_settings(spec, f"--rule {pattern}="))


# --- The backend's options, as every command that quantises takes them (``int8fx/cli/asked.py``) ----

PANEL = "How to quantise"


def _scheme_names(typed: str) -> list[str]:
    """For the shell, which completes what is typed."""
    from int8fx.kernels.schemes.table import SCHEMES

    return [name for name in SCHEMES if name.startswith(typed)]


def _option(metavar: str, text: str, **more: Any) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=PANEL, **more)


SchemesOption = Annotated[
    list[str] | None,
    _option(
        "SCHEME",
        "As llm.int8, or with settings llm.int8,threshold=3; commands that compare take several.",
        autocompletion=_scheme_names,
    ),
]
RuleOption = Annotated[
    list[str] | None,
    _option("PATTERN=SCHEME", "A scheme by module path; may be repeated, the first match wins."),
]
ThresholdOption = Annotated[
    float | None, _option("X", "An outlier is |x| >= X (6; 0: no decomposition).", parser=number)
]
DecompositionOption = Annotated[str | None, _option("NAME", "column, token or static.")]
CalibrationOption = Annotated[
    Path | None, _option("FILE", "What int8fx calibrate wrote, for schemes that keep columns.")
]
SkipOption = Annotated[
    list[str] | None,
    _option("PATTERN", "Modules that stay in float; may be repeated. +PATTERN adds to the default."),
]
OnlyOption = Annotated[
    list[str] | None, _option("PATTERN", "The only modules to quantise; may be repeated.")
]
OptionsFile = Annotated[
    Path | None, _option("FILE", "Options that int8fx suggest wrote; what is given beside them wins.")
]


def backend_options(asked: str = "", **given: Any) -> dict[str, Any]:
    """The options that were given, as ``torch.compile(..., options=...)`` takes them.

    Args:
        asked: what they were given to, for messages.

    Raises:
        UserError: names the option, what was given and what is allowed.
    """
    from int8fx.options import Options

    options = {name: value for name, value in given.items() if value is not None}
    try:
        Options.parse(options)
    except (OSError, ValueError) as error:
        raise UserError(f"{asked}{error}") from error
    return options
