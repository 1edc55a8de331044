"""How commands show their help: at once, in whole lines, and a switch without a type."""

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WITHOUT_TORCH = ("run",)  # commands that start faster than torch is imported


def _without_types(parameters: list[Any]) -> list[Any]:
    for each in parameters:
        if getattr(each, "is_flag", False) and each.metavar is None:
            each.metavar = ""
    return parameters


class Command(TyperCommand):
    def __init__(self, *args: Any, help: str | None = None, **more: Any) -> None:
        # The terminal breaks lines, and not the source, whose lines are of another length.
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        whole = "\n\n".join(" ".join(each.split()) for each in paragraphs)
        super().__init__(*args, help=whole, **more)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        if self.name not in WITHOUT_TORCH:
            import torch  # noqa: F401  and with it all of int8fx, where that waited for it
        return super().invoke(ctx)


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class App(typer.Typer):
    """Of such commands."""

    def __init__(self, **more: Any) -> None:
        super().__init__(cls=Group, **more)

    def command(self, *args: Any, **more: Any) -> Callable[..., Any]:
        return super().command(*args, **{"cls": Command, **more})
