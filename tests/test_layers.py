"""Imports point one way, and in no circle: imports inside functions and for type checkers included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Imports = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by the name that it is imported as."""
    found = {}
    for top in ("int8fx", "passes", "kernels"):
        for source in (root / top).rglob("*.py"):
            # A walk does not enter the symbolic links to the other two.
            parts = source.relative_to(root).with_suffix("").parts
            name = ".".join(parts if top == "int8fx" else ("int8fx", *parts))
            found[name.removesuffix(".__init__")] = source
    return found


def imports(sources: dict[str, str]) -> Imports:
    """What each module imports of the others, anywhere in its source."""
    found: Imports = {}
    for module, source in sources.items():
        named = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                named |= {each if each in sources else node.module for each in whole}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[module] = (named & sources.keys()) - {module}
    return found


def circles(graph: Imports) -> list[set[str]]:
    """The sets of modules that reach each other."""
    reached = {module: _reached(module, graph) for module in graph}
    together = {
        module: frozenset(each for each in reached[module] if module in reached[each])
        for module in graph
    }
    return [set(each) for each in set(together.values()) if each]


def _reached(module: str, graph: Imports) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[module])
    while ahead:
        each = ahead.pop()
        if each not in seen:
            seen.add(each)
            ahead += graph[each]
    return seen


@pytest.fixture(scope="module")
def graph() -> Imports:
    return imports({name: path.read_text() for name, path in modules(ROOT).items()})


def test_no_module_imports_itself_by_way_of_others(graph):
    assert len(graph) > 100
    assert circles(graph) == []


def test_layers_point_one_way(graph):
    """int8fx -> passes -> kernels, never back."""
    kernels, passes = "int8fx.kernels", "int8fx.passes"
    below = {kernels: (kernels,), passes: (kernels, passes)}
    for module, imported in graph.items():
        for layer, allowed in below.items():
            if module.startswith(layer):
                wrong = {each for each in imported if not each.startswith(allowed)}
                assert not wrong, f"{module} imports {wrong}"


def test_a_circle_is_found():
    sources = {
        "int8fx.a": "from int8fx import b",
        "int8fx.b": "def f():\n    from int8fx.c import x",
        "int8fx.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import int8fx.a",
        "int8fx.d": "import int8fx.a",
    }
    assert circles(imports(sources)) == [{"int8fx.a", "int8fx.b", "int8fx.c"}]
