"""What tells this package's compiled code from that of another version of it: a hash of its sources."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SUFFIXES = (".py", ".cpp", ".h", ".json")  # what is compiled for a GPU follows from its tiles


def sources(package: Path = PACKAGE) -> list[Path]:
    """Every source of this package, in all of its folders: the Python and the C++ ones."""
    # A walk does not enter symbolic links, and two folders of a checkout are some.
    folders = (package, package / "passes", package / "kernels")
    files = {file for folder in folders for file in folder.resolve().rglob("*")}
    return sorted(file for file in files if file.suffix in SUFFIXES)


@functools.cache
def cache_identity(package: Path = PACKAGE) -> str:
    """A hash of this package's sources: part of the key of every compile cache below us."""
    return f"int8fx-{digest(source.read_bytes() for source in sources(package))}"


def digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]
