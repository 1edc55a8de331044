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


def positive(given: str | int) -> int:
    """A count. Typer's own check would not say what was given."""
    try:
        count = int(given)
    except ValueError:
        count = 0
    if count < 1:
        raise typer.BadParameter(f"given {given!r}; allowed are whole numbers from 1")
    return count


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


def rule(given: str) -> tuple[str, str]:
    """``PATTERN=SCHEME`` of the command line as a rule of the options.

    Raises:
        UserError: there is no ``=`` in it.
    """
    pattern, separator, scheme = given.rpartition("=")
    if not separator:
        raise UserError(f"--rule {given!r}: allowed is PATTERN=SCHEME, as '*.mlp.*=llm.int8'")
    return pattern, scheme


# --- The backend's options, as every command that quantises takes them ----------------------------

ThresholdOption = Annotated[
    float | None, typer.Option(metavar="X", help="An outlier is |x| >= X (6; 0: no decomposition).")
]
DecompositionOption = Annotated[str | None, typer.Option(metavar="NAME", help="column or token.")]
SchemeOption = Annotated[str | None, typer.Option(metavar="NAME", help="How to quantise (llm.int8).")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What int8fx calibrate wrote, for schemes that keep columns."),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Modules that stay in float; may be repeated."),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="The only modules to quantise; may be repeated."),
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=SCHEME", help="A scheme by module path; the first match wins."),
]


def backend_options(**given: Any) -> dict[str, Any]:
    """The options that were given, as ``torch.compile(..., options=...)`` takes them.

    Raises:
        UserError: names the option, what was given and what is allowed.
    """
    from int8fx.options import Options

    options = {name: value for name, value in given.items() if value is not None}
    if "rules" in options:
        options["rules"] = [rule(text) for text in options["rules"]]
    try:
        Options.parse(options)
    except ValueError as error:
        raise UserError(str(error)) from error
    return options
