"""Whether kernels with a table of configurations try them out, or take the table's word.

``mode="max-autotune"`` asks for it: ``int8fx/compiler/inductor.py`` sets it while it compiles.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_ENABLED = contextvars.ContextVar("int8fx_tuning", default=False)


def enabled() -> bool:
    return _ENABLED.get()


@contextlib.contextmanager
def tuning(on: bool) -> Iterator[None]:
    """Within it, operators are traced with all configurations that their shapes allow, or with one."""
    token = _ENABLED.set(on)
    try:
        yield
    finally:
        _ENABLED.reset(token)
