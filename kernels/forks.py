"""Locks and ``os.fork``, by which a DataLoader makes its workers.

A child has the thread that forked, and no other: a lock that another one held is never released there.
"""

import os
from typing import Any, TypeVar

LockT = TypeVar("LockT")

FREED: list[Any] = []  # the locks that every child begins with released


def free_in_children(lock: LockT) -> LockT:
    """The lock, which stays for as long as the process: every child begins with it released."""
    renewed: Any = lock
    FREED.append(lock)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renewed._at_fork_reinit)
    return lock
