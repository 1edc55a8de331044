"""Compile the CPU kernels with the machine's C++ compiler, once per machine.

The shared object is kept in the user's cache directory under a name hashed from everything that
went into it. It is linked beside its final place and moved there in one step, so that processes
may race and builds may be interrupted.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("int8_linear.cpp")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-w",
    "-fvisibility=hidden",
)


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def build() -> Path:
    """The compiled kernels, from the cache if it holds them.

    Raises:
        BuildError: there is no compiler, it failed, or nothing can be written anywhere.
    """
    compiler = find_compiler()
    name = f"int8_linear_{_key(compiler)}.so"
    candidates = [directory / name for directory in cache_directories()]
    for library in candidates:
        if library.exists():
            return library
    for library in candidates:
        if _writable(library.parent):
            _compile(compiler, library)
            return library
    raise BuildError(f"no writable directory for it: tried {', '.join(map(str, candidates))}")


def find_compiler() -> list[str]:
    """The command of $CXX, or else of the first C++ compiler on the path."""
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]):
            return command
        raise BuildError(f"the C++ compiler in $CXX is not there: {command[0]}")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C++ compiler (tried $CXX, g++, clang++, c++)")


def cache_directories() -> list[Path]:
    """Where the kernels may be kept, best first: the user's cache, or a private temporary one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [cache / "int8fx", Path(tempfile.gettempdir()) / f"int8fx-{user}"]


def _key(compiler: list[str]) -> str:
    version = _run([*compiler, "--version"])
    key = hashlib.sha256()
    for part in (*compiler, version, torch.__version__, platform.machine(), *FLAGS):
        key.update(part.encode() + b"\0")
    for source in sorted([SOURCE, *SOURCE.parent.glob("*.h")]):
        key.update(source.read_bytes() + b"\0")
    return key.hexdigest()[:16]


def _writable(directory: Path) -> bool:
    """Whether we can write there, and others cannot (they could plant a library)."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError:
        return False
    private = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return private and os.access(directory, os.W_OK | os.X_OK)


def _compile(compiler: list[str], library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths  # slow to import

    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / library.name
        _run(
            [
                *compiler,
                *FLAGS,
                *(f"-isystem{path}" for path in include_paths()),
                str(SOURCE),
                "-o",
                str(output),
                *(f"-L{path}" for path in library_paths()),
                "-ltorch_cpu",
                "-lc10",
            ]
        )
        os.replace(output, library)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise BuildError(f"{command[0]} failed: {errors[0].strip()}")
    return done.stdout
