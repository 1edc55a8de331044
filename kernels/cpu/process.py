"""The library of CPU kernels in this process, from wherever it was loaded: torch imported or not.

It registers operators as it is loaded, which works once.
"""

import ctypes

_library: list[ctypes.CDLL] = []


def loaded() -> ctypes.CDLL | None:
    return _library[0] if _library else None


def keep(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, which ``loaded`` returns from now on."""
    _library.append(library)
    return library
