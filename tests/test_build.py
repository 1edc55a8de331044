"""Where the CPU kernels are kept: nothing that somebody else can have written is loaded."""

import ctypes
import hashlib
import os
import pathlib
import subprocess
import sys
from pathlib import Path

import pytest

from int8fx.bench.models import check_name
from int8fx.bench.smollm2 import cache_directory
from int8fx.errors import UserError
from int8fx.kernels.cpu import build

OURS = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
# A library runs as soon as it is loaded.
FOREIGN = """#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void run() {{ std::fclose(std::fopen("{marker}", "w")); }}
extern "C" __attribute__((visibility("default"))) int answer() {{ return 13; }}
"""
SOMEBODY = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The user's cache and the temporary folder, empty, with a library that compiles in no time."""
    source = tmp_path / "ours.cpp"
    source.write_text(OURS)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return build.cache_directories()


def name() -> str:
    return build.library_name(build.find_compiler())


@pytest.mark.parametrize("folder", [".", "isa"])
def test_a_header_that_changes_is_another_library(folder, places):
    """Or an older library would serve what newer sources say."""
    header = build.SOURCE.parent / folder / "part.h"
    header.parent.mkdir(exist_ok=True)
    header.write_text("// one\n")
    before = name()
    header.write_text("// two\n")
    assert name() != before


@pytest.fixture
def foreign(tmp_path, places):
    """A library that says that it ran, under the name of ours in a folder of its own, and the sign."""
    source, marker = tmp_path / "foreign.cpp", tmp_path / "it-ran"
    source.write_text(FOREIGN.format(marker=marker))
    library = tmp_path / "elsewhere" / name()
    library.parent.mkdir(mode=0o700)
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", source, "-o", library], check=True)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    library.with_name(f"{library.name}.sha256").write_text(digest)
    return library, marker


def plant(library: Path, folder: Path) -> Path:
    """Copies a library and its digest into a folder, as ours would lie there."""
    folder.mkdir(mode=0o700, parents=True)
    for file in library.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o755)
    return folder / library.name


def folder_of_another_user(library: Path, folder: Path) -> Path:
    os.chown(plant(library, folder).parent, SOMEBODY, SOMEBODY)
    return folder


def folder_that_the_group_writes(library: Path, folder: Path) -> Path:
    plant(library, folder).parent.chmod(0o770)
    return folder


def folder_that_all_write(library: Path, folder: Path) -> Path:
    plant(library, folder).parent.chmod(0o1777)
    return folder


def linked_folder(library: Path, folder: Path) -> Path:
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(library.parent)
    return folder


def library_of_another_user(library: Path, folder: Path) -> Path:
    planted = plant(library, folder)
    os.chown(planted, SOMEBODY, SOMEBODY)
    return planted


def library_that_all_write(library: Path, folder: Path) -> Path:
    planted = plant(library, folder)
    planted.chmod(0o757)
    return planted


def linked_library(library: Path, folder: Path) -> Path:
    planted = plant(library, folder)
    planted.unlink()
    planted.symlink_to(library)
    return planted


PLANTED = (
    pytest.param(folder_of_another_user, "belongs to another user", marks=needs_root),
    (folder_that_the_group_writes, "can be written to by others"),
    (folder_that_all_write, "can be written to by others"),
    (linked_folder, "is a symbolic link"),
    pytest.param(library_of_another_user, "belongs to another user", marks=needs_root),
    (library_that_all_write, "can be written to by others"),
    (linked_library, "is a symbolic link"),
)


@pytest.mark.parametrize("place", [0, 1], ids=["cache", "temporary"])
@pytest.mark.parametrize(("planted", "why"), PLANTED)
def test_what_somebody_else_can_have_put_there_never_runs(planted, why, place, places, foreign):
    library, marker = foreign
    refused = planted(library, places[place])
    with pytest.warns(UserWarning, match=f"{refused} {why}"):
        loaded = build.load()
    assert loaded.answer() == 42
    assert not marker.exists()


def test_a_library_that_is_ours_alone_is_loaded(places, foreign):
    library, marker = foreign
    plant(library, places[0])
    assert build.load().answer() == 13
    assert marker.exists()


def test_what_is_loaded_is_what_was_looked_at(places, foreign, monkeypatch):
    library, marker = foreign
    ours = build.build()
    open_file = build.open_file

    def swapped_once_it_is_open(name: str, folder: int, path: Path) -> int:
        opened = open_file(name, folder, path)
        if path == ours:
            os.replace(library, ours)
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(build, "build", lambda passed_over: ours)
        patch.setattr(build, "open_file", swapped_once_it_is_open)
        assert build.load().answer() == 42
    assert not marker.exists()


@pytest.mark.parametrize("size", ["nothing", "its header", "half", "all but a byte"])
def test_a_library_that_is_cut_off_is_built_again(size, places, caplog):
    library = build.build()
    whole = library.read_bytes()
    sizes = {"nothing": 0, "its header": 64, "half": len(whole) // 2, "all but a byte": len(whole) - 1}
    library.write_bytes(whole[: sizes[size]])
    assert build.load().answer() == 42
    assert library.read_bytes() == whole
    assert f"{library} is compiled again" in caplog.text


def test_a_library_without_its_digest_is_built_again(places):
    library = build.build()
    Path(f"{library}.sha256").unlink()
    library.write_bytes(b"")
    assert build.load().answer() == 42


def test_a_place_that_lets_nothing_run_is_passed_over(places, monkeypatch):
    library = build.build()
    load = ctypes.CDLL

    def noexec(path: str) -> ctypes.CDLL:
        if os.path.realpath(path) == str(library):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(build.ctypes, "CDLL", noexec)
    assert build.load().answer() == 42
    assert (places[1] / library.name).exists()
    monkeypatch.setattr(build, "cache_directories", lambda: places[:1])
    with pytest.raises(build.BuildError, match=f"{library} cannot be loaded: failed to map segment"):
        build.load()


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_what_is_built_under_an_open_umask_is_loaded_the_next_time(umask, places):
    before = os.umask(umask)
    try:
        library = build.build()
    finally:
        os.umask(before)
    built = library.stat().st_ino
    assert build.build() == library
    assert build.load().answer() == 42
    assert library.stat().st_ino == built  # else it was compiled again


def test_a_compiler_that_no_shell_could_read_is_named(places, monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(build.BuildError, match=r"\$CXX is no command: .*: No closing quotation"):
        build.build()


def test_a_compiler_that_writes_nothing_is_an_error_of_the_build(tmp_path, places, monkeypatch):
    compiler = tmp_path / "writes-nothing"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"cannot be written: .*No such file"):
        build.build()


def without_a_home(monkeypatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", no_home)


def test_without_a_home_the_temporary_folder_serves(places, monkeypatch):
    without_a_home(monkeypatch)
    assert build.build().parent == places[1]
    monkeypatch.setattr(build.tempfile, "gettempdir", raise_not_found)
    with pytest.raises(build.BuildError, match="no writable directory for it: tried none"):
        build.build()


def raise_not_found() -> str:
    raise FileNotFoundError("No usable temporary directory found")


def test_without_a_home_the_command_says_what_to_set(places, monkeypatch):
    without_a_home(monkeypatch)
    with pytest.raises(UserError, match=r"no home folder.*XDG_CACHE_HOME"):
        cache_directory()


def test_a_home_that_is_not_there_is_no_model():
    with pytest.raises(UserError, match=r"model ~nobody-of-that-name/x: no such file or directory"):
        check_name("~nobody-of-that-name/x")


# In a process of its own: other tests map other libraries.
OF_A_PROCESS = """
from int8fx.kernels.cpu import build, int8_linear

assert int8_linear.load() is None
with open("/proc/self/maps") as maps:
    (path,) = {line.split(maxsplit=5)[5].strip() for line in maps if "/int8_linear_" in line}
assert str(build.build()) == path, path
"""


def test_the_library_of_a_process_was_looked_at():
    subprocess.run([sys.executable, "-c", OF_A_PROCESS], check=True)
