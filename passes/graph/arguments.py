"""Arguments of an operator by the names of its schema, wherever in a call they stand.

    f(x, 6.0)    f(x, threshold=6.0)    f(x=x, threshold=6.0)      one call to a pass

So an operator may get an argument more without a pass that reads another one.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class _Parameter:
    name: str
    by_name_only: bool
    default: Any  # a tuple of one, or of none


def _parameters(target: Any) -> list[_Parameter]:
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return [
            _Parameter(
                each.name,
                each.kwarg_only,
                (each.default_value,) if each.has_default_value() else (),
            )
            for each in schema.arguments
        ]
    found = inspect.signature(target).parameters.values()
    return [
        _Parameter(
            each.name,
            each.kind is each.KEYWORD_ONLY,
            () if each.default is each.empty else (each.default,),
        )
        for each in found
    ]


def takes(target: Any, name: str) -> bool:
    """Whether an operator with a schema has an argument of this name."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(each.name == name for each in schema.arguments)


def given(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call gives, by name."""
    names = [each.name for each in _parameters(node.target)]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def argument(node: fx.Node, name: str) -> Any:
    """An argument of a call, or its default.

    Raises:
        TypeError: the operator has no such argument, or the call does not give it.
    """
    values = given(node)
    if name in values:
        return values[name]
    for each in _parameters(node.target):
        if each.name == name and each.default:
            return each.default[0]
    raise TypeError(f"{node.format_node()} gives no {name!r}")


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Gives a call another argument.

    Raises:
        TypeError: the operator has no such argument.
    """
    node.args, node.kwargs = arranged(node.target, given(node) | {name: value})


def arranged(target: Any, values: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """``args`` and ``kwargs`` of a call with these arguments: by position as far as there is no gap.

    Raises:
        TypeError: the operator has no argument of one of the names.
    """
    parameters = _parameters(target)
    if unknown := values.keys() - {each.name for each in parameters}:
        known = ", ".join(each.name for each in parameters)
        raise TypeError(f"{target} has no {', '.join(sorted(unknown))}; it has {known}")
    args: list[Any] = []
    for each in parameters:
        if each.by_name_only or each.name not in values:
            break
        args.append(values[each.name])
    named = [each.name for each in parameters[len(args) :] if each.name in values]
    return tuple(args), {name: values[name] for name in named}
