"""Checks of what the public functions are given, before anything is done."""

from typing import Any, TypeVar

from torch import nn

# Of a function that returns the module that it was given: editors know its class afterwards, too.
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def check_module(given: Any, taker: str) -> None:
    """Raises:
    TypeError: names what was given in the place of a module.
    """
    if isinstance(given, nn.Module):
        return
    if isinstance(given, type) and issubclass(given, nn.Module):
        raise TypeError(f"{taker}: given the class {given.__name__}; allowed: a module that it makes")
    raise TypeError(
        f"{taker}: given {type(given).__name__}; allowed: a torch.nn.Module{_inside(given)}"
    )


def check_callable(given: Any, taker: str) -> None:
    """Raises:
    TypeError: names what was given in the place of a module or a function.
    """
    if not callable(given):
        raise TypeError(
            f"{taker}: given {type(given).__name__}; allowed: a torch.nn.Module or a function"
            f"{_inside(given)}"
        )


def _inside(given: Any) -> str:
    """What a pipeline, a trainer and their like hold."""
    held = getattr(given, "model", None)
    return f"; its .model is a {type(held).__name__}" if isinstance(held, nn.Module) else ""
