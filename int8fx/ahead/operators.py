"""The operators that a compiled graph calls by torch's dispatcher, as AOTInductor lists them.

Those of int8fx are among them, and the few of aten that torch's C interface lacks.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from int8fx import torch_private
from int8fx.errors import UserError

Calls = list[tuple[str, str, list[tuple[str, Any]]]]

# The kinds of AOTInductor's arguments: what they are here, of which number or of which value.
_COUNTED = {"as_tensor": "tensor", "as_tensors": "tensors", "as_int": "int", "as_ints": "ints"}
_FIXED = {"as_float": "real", "as_bool": "flag", "as_string": "text"}


def operator_calls(files: Sequence[Path]) -> Calls:
    """What a graph calls, see ``artefact.Graph``.

    Raises:
        UserError: a call is of a kind that nothing here makes.
    """
    listed = [json.loads(path.read_text()) for path in files if path.suffix == ".json"]
    nodes = next((each["nodes"] for each in listed if "nodes" in each), ())
    return [_call(each["node"]) for each in nodes]


def _call(node: dict[str, Any]) -> tuple[str, str, list[tuple[str, Any]]]:
    name, _, overload = node["target"].partition(".")
    schema = torch_private.operator_named(node["target"])._schema
    given = {each["name"]: each["arg"] for each in node["inputs"]}
    if schema.is_mutable or given.keys() != {each.name for each in schema.arguments}:
        raise UserError(
            f"the graph calls {node['target']}, which writes to its arguments or leaves some out"
        )
    arguments = [_argument(node["target"], given[each.name]) for each in schema.arguments]
    return name, overload, arguments


def _argument(operator: str, given: dict[str, Any]) -> tuple[str, Any]:
    ((kind, value),) = given.items()
    if kind == "as_optional_tensor":
        return _argument(operator, value)
    if kind == "as_none":
        return "none", 0
    if kind in _COUNTED:
        return _COUNTED[kind], len(value) if isinstance(value, list) else 1
    if kind in _FIXED:
        return _FIXED[kind], value
    raise UserError(f"the graph calls {operator} with an argument {kind}, which nothing here passes on")


def operators_of(calls: Calls) -> list[tuple[str, str, str]]:
    """Those of int8fx: ``(name, overload, schema)``.

    Raises:
        UserError: one is in Python alone.
    """
    found = []
    for name, overload in sorted({(name, overload) for name, overload, _ in calls}):
        if name.startswith("int8fx::"):
            operator = torch_private.operator_named(f"{name}.{overload}")
            if not torch_private.has_cpu_kernel(operator):
                raise UserError(f"{name} has no kernel in C++, so nothing runs it without Python")
            found.append((name, overload, str(operator._schema)))
    return found
