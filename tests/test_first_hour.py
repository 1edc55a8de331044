"""``docs/first_hour.md``: what a stranger types is typed, and what the page shows is what came.

python tests/test_first_hour.py        writes the page's outputs anew
"""

import importlib.util
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from int8fx.bench import smollm2
from int8fx.kernels.cpu import int8_linear

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first_hour.md"
MODEL = smollm2.cache_directory() / smollm2.CONVERTED
BLOCK = re.compile(r"^```(console|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (?:.*\\\n)*.*\n", re.MULTILINE)  # goes on where a line ends in a backslash
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
PROGRAMS = {
    "python": 'exec "{python}" "$@"',
    "int8fx": 'exec "{python}" -m int8fx "$@"',
    "transformers": 'exec "{python}" -c "from transformers.cli.transformers import main; main()" "$@"',
}
SERVER_SECONDS = 240
SHOWN = "avx512_vnni"  # the instruction set, on which some passes depend


class Shell:
    """Runs the page's commands in a folder of their own; a last ``&`` starts a server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[subprocess.Popen] = []
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name, line in PROGRAMS.items():
            path = programs / name
            path.write_text(f"#!/bin/sh\n{line.format(python=sys.executable)}\n")
            path.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "80",
        }

    def run(self, command: str) -> str:
        """What a command prints on stdout."""
        common = {"shell": True, "cwd": self.folder / "work", "env": self.environment}
        (self.folder / "work").mkdir(exist_ok=True)
        if command.endswith("&"):
            port = int(re.search(r"--port (\d+)", command)[1])
            self.servers.append(
                subprocess.Popen(
                    command.removesuffix("&"),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    **common,
                )
            )
            _wait_for(port)
            return ""
        done = subprocess.run(command, capture_output=True, text=True, check=False, **common)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        return done.stdout

    def write(self, text: str) -> None:
        """A program of the page, whose first line names its file."""
        (self.folder / "work").mkdir(exist_ok=True)
        name = text.partition("\n")[0].removeprefix("# ")
        (self.folder / "work" / name).write_text(text)

    def close(self) -> None:
        for server in self.servers:
            os.killpg(server.pid, 15)
            server.wait()


def _wait_for(port: int) -> None:
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise TimeoutError(f"nothing answers at port {port}")


def replayed(page: str, shell: Shell) -> str:
    """The page with the outputs that its commands have now."""

    def block(found: re.Match[str]) -> str:
        kind, text = found.groups()
        if kind == "py":
            shell.write(text)
            return found[0]
        lines = []
        for command in COMMAND.findall(text):
            shown = shell.run(command.removeprefix("$ ").rstrip("\n")).rstrip().splitlines()
            lines += [command.rstrip("\n"), *(each.rstrip() for each in shown)]
        return "```console\n" + "\n".join(lines) + "\n```"

    return BLOCK.sub(block, page)


def alike(one: str, other: str) -> bool:
    """Whether two texts have the same words, and numbers that differ by a tenth at most."""
    if NUMBER.sub("", one).split() != NUMBER.sub("", other).split():
        return False
    numbers = ([float(each.replace(",", "")) for each in NUMBER.findall(text)] for text in (one, other))
    return all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.11) for a, b in zip(*numbers, strict=True))


NEEDED = ("peft", "fastapi", "uvicorn", "openai")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(not MODEL.is_dir(), reason="int8fx demo has not fetched SmolLM2 here")
@pytest.mark.skipif(bool(MISSING), reason=f"the page needs {', '.join(MISSING)}")
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page needs curl")
def test_the_page_is_what_happens(tmp_path):
    if int8_linear.isa() != SHOWN:
        pytest.skip(f"the page shows a CPU with {SHOWN}, and this one has {int8_linear.isa()}")
    page, shell = PAGE.read_text(), Shell(tmp_path)
    try:
        now = replayed(page, shell)
    finally:
        shell.close()
    pairs = zip(BLOCK.findall(page), BLOCK.findall(now), strict=True)
    different = [(shown, came) for (_, shown), (_, came) in pairs if not alike(shown, came)]
    assert different == []


def test_every_part_of_the_hour_is_in_the_page():
    shown = dict.fromkeys(re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE))
    expected = [
        "Install",
        "Look",
        "Compile",
        "Quantise and save",
        "Load elsewhere",
        "Fine-tune",
        "Serve",
    ]
    assert list(shown) == expected
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "console" and not text.rstrip().endswith("&"):
            assert re.search(r"^[^$]", text, re.MULTILINE), f"no output: {text}"


def test_words_and_numbers_are_compared():
    assert alike("step 1: loss 5.0", "step 1: loss 5.2")
    assert not alike("step 1: loss 5.0", "step 1: loss 6.2")
    assert not alike("Paris 1", "London 1")


if __name__ == "__main__":
    import tempfile

    shell = Shell(Path(tempfile.mkdtemp()))
    try:
        PAGE.write_text(replayed(PAGE.read_text(), shell))
    finally:
        shell.close()
