"""Fresh processes in which this checkout is installed, whatever the environment has installed."""

import os
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def install(folder: Path) -> dict[str, str]:
    """The environment variables of a process that finds this checkout, and its entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = folder / f"int8fx-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: int8fx\nVersion: {project['version']}\n"
    )
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run(code: str, environment: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, in an empty place.

    What Dynamo warns of Python 3.13.0 is none of its words.
    """
    (folder, _) = environment["PYTHONPATH"].split(os.pathsep)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONWARNINGS": "ignore:Guards may run slower", **environment, **changes},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
