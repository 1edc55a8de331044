"""The command ``int8fx``.

Heavy imports (torch, transformers) are inside the commands, so that ``--help`` answers at once.
"""

import functools
import importlib.metadata
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from int8fx.errors import UserError

FAILED = 1
INTERRUPTED = 130  # as shells count it: 128 + SIGINT

app = typer.Typer(help="LLM.int8() inside torch.compile.", no_args_is_help=True, add_completion=False)

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; every error is one line on stderr, and the exit code is not 0."""
    try:
        return app(args=arguments, prog_name="int8fx", standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        # The parser's own errors. Their base class has moved between typer's releases; this
        # method is what they have in common.
        if not hasattr(error, "format_message"):
            raise
        # It is empty when the help was shown instead.
        message = error.format_message().removesuffix(".")
        code = getattr(error, "exit_code", FAILED)
        return _complain(f"{message}; see --help", code) if message else code


def _complain(message: str, code: int = FAILED) -> int:
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
            raise typer.Exit(_complain("interrupted", INTERRUPTED)) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            raise typer.Exit(_complain(_one_line(error))) from None

    return run


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
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


def _print_version(asked: bool) -> None:
    if asked:
        print(f"int8fx {importlib.metadata.version('int8fx')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
@one_line_errors
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A causal language model: a directory, a .gguf file, or a hub name. "
            "Without it, SmolLM2-135M-Instruct is fetched once (93 MB; 640 MB in the cache).",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What to generate from.")
    ] = "Why is the sky blue? Answer in two sentences.",
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many to generate, at most.")
    ] = 64,
    windows: Annotated[
        int,
        typer.Option(
            parser=positive,
            metavar="N",
            help="How many windows of 512 tokens to judge the accuracy on, at most.",
        ),
    ] = 10,
    debug: DebugOption = False,
) -> None:
    """Sets a model as loaded, Inductor's bf16 and llmint8 side by side, in one table.

    Most of the time goes into compiling, which the next run finds in Inductor's cache.
    """
    progress = Console(stderr=True)
    from int8fx.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx.demo import Settings, run

    run(Settings(model, prompt, tokens, windows), Console(), progress)
