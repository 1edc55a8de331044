"""Which folders and files of a cache may be run: what only this user, or root, can have written.

A library runs in the process of whoever loads it, and a cache may lie where others can write, as
under ``/tmp``. What is asked is asked of the opened file, and the opened file is what is used: a name
may stand for something else a moment later.
"""

import os
import stat
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class ForeignError(Exception):
    """Somebody else can have written there; the message names the path and says why."""


def open_folder(path: Path) -> int:
    """A descriptor of a folder that is ours alone.

    Raises:
        ForeignError: it is a link or no folder, or somebody else can write to it.
        OSError: it is not there, or cannot be opened.
    """
    return _open(path, path, None, os.O_DIRECTORY)


def open_file(name: str, folder: int, path: Path) -> int:
    """A descriptor of a file that is ours alone.

    Args:
        folder: of ``open_folder``.
        path: of the file, for messages.

    Raises:
        ForeignError: it is a link or no file, or somebody else can write to it.
        OSError: it is not there, or cannot be opened.
    """
    return _open(name, path, folder, os.O_NONBLOCK)  # a pipe must not make us wait


def _open(name: str | Path, path: Path, folder: int | None, flags: int) -> int:
    what = stat.S_ISDIR if flags & os.O_DIRECTORY else stat.S_ISREG
    _require(path, os.stat(name, dir_fd=folder, follow_symlinks=False), what)
    opened = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, dir_fd=folder)
    try:
        _require(path, os.fstat(opened), what)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _require(path: Path, status: os.stat_result, what: object) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ForeignError(f"{path} is a symbolic link")
    if not what(status.st_mode):  # type: ignore[operator]
        kind = "folder" if what is stat.S_ISDIR else "file"
        raise ForeignError(f"{path} is no {kind}")
    if status.st_uid not in (0, os.geteuid()):
        raise ForeignError(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & OTHERS_WRITE:
        mode = stat.filemode(status.st_mode)
        raise ForeignError(f"{path} can be written to by others ({mode})")
