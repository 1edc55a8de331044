"""The layout: both import paths work, installed or not, beside Hugging Face's package ``kernels``."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from int8fx.compiler.inductor import cache_identity

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": "" if path is None else str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hugging_face(tmp_path):
    """A stand-in for the package that transformers imports under the name ``kernels``."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("whose = 'hugging face'\n")
    return package.parent


def test_the_checkout_does_not_shadow_the_package_kernels(hugging_face):
    modules = "kernels, int8fx.kernels.ops.int8_linear, int8fx.passes.linears.lower"
    code = f"import {modules}; print(kernels.whose)"
    assert run(code, ROOT, hugging_face) == "hugging face"


def test_no_folder_holds_an_init_that_would_shadow_it():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "passes" / "__init__.py").exists()
    for name in ("kernels", "passes"):
        link = ROOT / "int8fx" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_a_wheel_holds_everything_and_imports(tmp_path, hugging_face):
    # In a copy: setuptools leaves a folder build/ behind, and would pack what an older one left.
    source_tree = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "venv")
    shutil.copytree(ROOT, source_tree, symlinks=True, ignore=ignored)
    tables = source_tree / "kernels" / "gpu" / "tables"
    tables.mkdir(exist_ok=True)
    (tables / "toy.json").write_text("{}")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(source_tree)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("int8fx-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kinds = (".py", ".cpp", ".h", ".json")
    sources = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in kinds]
    sources += (ROOT / "passes").glob("*.py")
    for source in sources:
        assert f"int8fx/{source.relative_to(ROOT).as_posix()}" in names
    assert "int8fx/kernels/gpu/tables/toy.json" in names
    assert "int8fx/py.typed" in names
    assert any(name.startswith("int8fx/data/") and name.endswith(".txt") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    declared = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "[torch.backends]\nint8fx = int8fx_autoload:autoload\n" in declared
    assert "int8fx_autoload.py" in names  # a missing one would make import torch fail
    assert "[console_scripts]\nint8fx = int8fx_run:main\n" in declared
    assert "int8fx_run.py" in names and "int8fx/ahead/runner.cpp" in names
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import sys, kernels, int8fx, int8fx.kernels.ops.int8_linear, int8fx.compiler.pipeline;"
        "print(kernels.whose, int8fx.__file__)"
    )
    printed = run(f"import sys; sys.path.insert(0, {str(target)!r}); {code}", tmp_path, hugging_face)
    assert printed == f"hugging face {target / 'int8fx' / '__init__.py'}"


def test_an_edit_in_any_folder_is_another_key_of_the_compile_caches(tmp_path):
    """The sources are part of it: a folder left out would serve what older sources compiled."""
    names = ("int8fx", "kernels", "passes")
    for name in names:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    identity = cache_identity.__wrapped__
    files = [file for name in names for file in (tmp_path / name).rglob("*")]
    one_of_each = {
        (file.parent, file.suffix): file for file in files if file.suffix in (".py", ".cpp", ".h")
    }
    assert len(one_of_each) > 5
    assert (tmp_path / "kernels" / "cpu" / "isa", ".h") in one_of_each
    for place, edited in one_of_each.items():
        before = identity(tmp_path / "int8fx")
        with edited.open("a") as source:
            source.write("\n")
        assert identity(tmp_path / "int8fx") != before, place
    before, tables = identity(tmp_path / "int8fx"), tmp_path / "kernels" / "gpu" / "tables"
    tables.mkdir(exist_ok=True)
    (tables / "toy.json").write_text("{}")  # the tiles of a GPU
    assert identity(tmp_path / "int8fx") != before


def test_imports_point_one_way():
    """int8fx -> passes -> kernels, never back."""
    forbidden = {"kernels": ("int8fx.passes",), "passes": ()}
    own = {"kernels": "int8fx.kernels", "passes": ("int8fx.kernels", "int8fx.passes")}
    for folder, allowed in own.items():
        for source in (ROOT / folder).rglob("*.py"):
            for line in source.read_text().splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].startswith("int8fx"):
                    assert words[1].startswith(allowed), f"{source}: {line}"
                    assert not words[1].startswith(forbidden[folder] or ("-",)), f"{source}: {line}"


# Products that torch has under no other name.
WITHOUT_A_PUBLIC_NAME = {"torch._int_mm", "torch._grouped_mm", "tl.standard._elementwise_max"}
# Attributes of tensors and storages, whatever the variable is called.
PRIVATE_OF_TENSORS = {"_version", "_cdata", "_base", "_is_view", "_backward_hooks"}


def private_names(source: str) -> set[str]:
    """The private names of torch and triton that a source touches."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            if node.attr in PRIVATE_OF_TENSORS:
                found.add(node.attr)
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in parts)
            if private and root in ("torch", "triton", "tl", "nn", "F", "fx"):
                found.add(name)
    return {name for name in found if not any(allowed in name for allowed in WITHOUT_A_PUBLIC_NAME)}


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo.utils",
        "from torch._C import x",
        "def f():\n    from torch import _utils",
        "torch._inductor.config.x = 1",
        "nn.modules.conv._ConvNd",
        "y = x._version + 1",
    ],
)
def test_the_guard_sees_private_names(source):
    assert private_names(source)


def test_only_one_module_touches_private_torch_names():
    found = {}
    for top in ("int8fx", "passes", "kernels"):
        for source in (ROOT / top).rglob("*.py"):
            # What tests use looks behind torch, and no user's compile runs it.
            apart = source.name == "torch_private.py" or ROOT / "int8fx" / "testing" in source.parents
            names = set() if apart else private_names(source.read_text())
            if names:
                found[str(source.relative_to(ROOT))] = names
    assert found == {}


DEVICES = {"cpu", "cuda", "meta", "mps", "xpu", "hpu", "xla", "hip"}
ASKED_OF_A_TENSOR = {"is_cpu", "is_cuda", "is_mps", "is_xpu", "is_hpu", "is_xla"}


def device_comparisons(source: str) -> set[str]:
    """Where a source compares the type of a device, or asks a tensor for it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ASKED_OF_A_TENSOR:
            found.add(ast.unparse(node))
        if any(map(_names_a_device, _compared(node))):
            found.add(ast.unparse(node))
    return found


def _compared(node: ast.AST) -> list[ast.expr]:
    """What a node compares, the members of a tuple, list or set one by one."""
    if isinstance(node, ast.MatchValue):
        return [node.value]
    operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return [part for each in operands for part in getattr(each, "elts", [each])]


def _names_a_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr == "type":
        return ast.unparse(node.value).endswith("device")
    return isinstance(node, ast.Constant) and node.value in DEVICES


@pytest.mark.parametrize(
    "source",
    [
        "x.device.type == 'cpu'",
        "x.device.type != y.device.type",
        "if device in ('cuda', 'mps'): pass",
        "served = 'cuda' == kind",
        "y = x.is_cuda",
        "match kind:\n    case 'cuda': pass",
    ],
)
def test_the_guard_sees_comparisons_of_devices(source):
    assert device_comparisons(source)


def test_only_kernels_compare_the_type_of_a_device():
    """Passes and the rest ask ``kernels/devices.py`` and ``kernels/table.py``."""
    found = {}
    # What pretends to be a GPU, and what asks vLLM which platform it runs on.
    apart = {"testing", "vllm"}
    for top in ("int8fx", "passes"):
        for source in (ROOT / top).rglob("*.py"):
            compared = device_comparisons(source.read_text())
            if compared and apart.isdisjoint(source.parts):
                found[str(source.relative_to(ROOT))] = compared
    assert found == {}
