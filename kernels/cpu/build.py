"""Compile the CPU kernels with the machine's C++ compiler, once per machine, and load them.

The shared object is kept in the user's cache directory under a name hashed from everything that
went into it. It is linked beside its final place and moved there in one step, so that processes
may race and builds may be interrupted. Its SHA-256 lies beside it: a library that is cut off would
not only fail to load, but end the process when a page behind its end is touched.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path

import torch

from int8fx.kernels.cpu.trusted import OTHERS_WRITE, ForeignError, open_file, open_folder

log = logging.getLogger(__name__)

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
    """The kernels cannot be compiled or loaded here; the message says why."""


class DamagedError(Exception):
    """A library that is not what was compiled."""


def load() -> ctypes.CDLL:
    """The kernels in this process, from the first place that lets them run.

    Raises:
        BuildError: as ``build``, or no place lets them run (a file system that is mounted noexec).
    """
    unloadable: dict[Path, str] = {}
    while True:
        try:
            library = build(unloadable)
        except BuildError as error:
            raise BuildError("; ".join([*unloadable.values(), str(error)])) from error
        try:
            return _load(library)
        except (OSError, ForeignError, DamagedError) as error:
            unloadable[library.parent] = f"{library} cannot be loaded: {error}"
            log.warning("%s", unloadable[library.parent])


def build(passed_over: Collection[Path] = (), source: Path | None = None) -> Path:
    """The compiled kernels, from the cache if it holds them whole, and only we can have put them there.

    Args:
        passed_over: directories that are not looked at.
        source: of another library that stands on torch's C++ interface; None, the kernels'.

    Raises:
        BuildError: there is no compiler, it failed, or nothing can be written anywhere.
    """
    compiler = find_compiler()
    name = library_name(compiler, source)
    candidates = [directory / name for directory in cache_directories() if directory not in passed_over]
    for library in candidates:
        if _is_usable(library):
            return library
    for library in candidates:
        if _writable(library.parent):
            _compile(compiler, source or SOURCE, library)
            return library
    raise BuildError(f"no writable directory for it: tried {', '.join(map(str, candidates)) or 'none'}")


def find_compiler() -> list[str]:
    """The command of $CXX, or else of the first C++ compiler on the path."""
    given = os.environ.get("CXX", "")
    try:
        command = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"$CXX is no command: {given!r}: {error}") from error
    if command:
        if shutil.which(command[0]):
            return command
        raise BuildError(f"the C++ compiler in $CXX is not there: {command[0]}")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C++ compiler (tried $CXX, g++, clang++, c++)")


def cache_directories() -> list[Path]:
    """Where the kernels may be kept, best first: the user's cache, and a private temporary one; without
    those that this machine has not."""
    found = []
    with contextlib.suppress(RuntimeError):  # there is no home folder
        found.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int8fx")
    with contextlib.suppress(FileNotFoundError):  # no temporary folder can be written to
        found.append(Path(tempfile.gettempdir()) / f"int8fx-{os.getuid()}")
    return found


def library_name(compiler: list[str], source: Path | None = None) -> str:
    """Another one for each compiler, torch, machine, flag and source; None, the kernels'."""
    stem = "int8_linear" if source is None else source.stem
    source = source or SOURCE
    version = _run([*compiler, "--version"])
    key = hashlib.sha256()
    for part in (*compiler, version, torch.__version__, platform.machine(), *FLAGS):
        key.update(part.encode() + b"\0")
    for file in sorted([source, *source.parent.rglob("*.h")]):
        key.update(file.read_bytes() + b"\0")
    return f"{stem}_{key.hexdigest()[:16]}.so"


def _is_usable(library: Path) -> bool:
    """Whether a library is there, whole, and ours. Says why one that is there is not."""
    try:
        os.close(_open(library))
    except FileNotFoundError:
        return False
    except ForeignError as error:
        warnings.warn(
            f"{error}: int8fx loads no library from there, and compiles one",
            UserWarning,
            stacklevel=2,
        )
        return False
    except (OSError, DamagedError) as error:
        log.warning("%s is compiled again: %s", library, error)
        return False
    return True


def _open(library: Path) -> int:
    """A descriptor of a library.

    Raises:
        ForeignError: somebody else can have written it.
        DamagedError: it is not as it was compiled.
        OSError: it is not there, or cannot be read.
    """
    folder = open_folder(library.parent)
    try:
        digest = _digest_of(library)
        with open(open_file(digest.name, folder, digest), "rb") as file:
            expected = file.read(64)
        opened = open_file(library.name, folder, library)
    finally:
        os.close(folder)
    with open(opened, "rb", closefd=False) as file:
        if hashlib.sha256(file.read()).hexdigest().encode() != expected:
            os.close(opened)
            raise DamagedError("it is not as it was compiled (cut off?)")
    return opened


def _digest_of(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _load(library: Path) -> ctypes.CDLL:
    """The library that was looked at, whatever its name stands for by now."""
    # The descriptor stays open: the loader knows a library by its name, which nothing else must get.
    return ctypes.CDLL(f"/proc/self/fd/{_open(library)}")


def _writable(directory: Path) -> bool:
    """Whether we can write there, and others cannot (they could plant a library)."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(open_folder(directory))
    except (OSError, ForeignError):
        return False
    return os.access(directory, os.W_OK | os.X_OK)


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            output = Path(scratch) / library.name
            _run([*compiler, *_arguments(source, output)])
            output.chmod(output.stat().st_mode & ~OTHERS_WRITE)  # a umask may let the group write
            digest = _digest_of(output)
            digest.write_text(hashlib.sha256(output.read_bytes()).hexdigest())
            digest.chmod(digest.stat().st_mode & ~OTHERS_WRITE)
            os.replace(digest, _digest_of(library))
            os.replace(output, library)
    except OSError as error:
        raise BuildError(f"it cannot be written: {error}") from error


def _arguments(source: Path, output: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths  # slow to import

    return [
        *FLAGS,
        *(f"-isystem{path}" for path in include_paths()),
        str(source),
        "-o",
        str(output),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-lc10",
    ]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise BuildError(f"{command[0]} failed: {errors[0].strip()}")
    return done.stdout
