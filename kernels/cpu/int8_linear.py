"""The CPU kernels of ``int8_linear`` and ``int8_linears``: loading, and the weight's packing.

The operators are implemented in C++ (``int8_linear.cpp``) and registered from there, so that a
compiled graph calls them without Python in between.

Packed weight, ``[ceil(N / NR), K_padded * NR + 4 * NR]`` int8, K_padded the next multiple of
K_MULTIPLE: for each micro-panel of NR channels ``[K_padded / 4][NR][4]``, padded with zeros, then the
channels' sums over k as int32 (the correction where an instruction wants unsigned activations). 64
bytes are one vpdpbusd operand and 1024 one AMX tile.
"""

import ctypes
import functools
import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from int8fx.kernels.cpu import build, pages, process
from int8fx.kernels.forks import free_in_children

# As in packed_weight.h.
NR = 16
K_MULTIPLE = 64

_lock = free_in_children(threading.Lock())


def load() -> str | None:
    """Compile (at first use on a machine) and register the kernels; None, or why that failed."""
    with _lock:
        return _load()[1]


def isa() -> str:
    """The best instruction set that this machine can execute."""
    return isas()[0]


def isas() -> list[str]:
    """The instruction sets that this machine can execute, best first."""
    return _library().int8fx_isas().decode().split()


def use_isa(name: str) -> None:
    """For tests and benchmarks: always use one of ``isas()``, or again the best with ``"auto"``."""
    if not _library().int8fx_use_isa(name.encode()):
        raise ValueError(f"this machine cannot execute {name!r}, only {isas()}")


def forbid_data_access(storage: int, message: str | None) -> bool:
    """Makes whoever asks for the data of a storage, given by its address, get an error with a message;
    with None, the data again.

    Returns:
        Whether that was done: not where the kernels cannot be compiled.
    """
    if load() is not None:
        return False
    _library().int8fx_forbid_data_access(storage, message and message.encode())
    return True


def packed_shape(N: int, K: int) -> tuple[int, int]:
    """Of the layout above."""
    return -(-N // NR), -(-K // K_MULTIPLE) * K_MULTIPLE * NR + 4 * NR


def pack(w_int8: Tensor) -> Tensor:
    """``w_int8 [N, K]`` in the layout above."""
    N, K = w_int8.shape
    padding = (0, -K % K_MULTIPLE, 0, -N % NR)
    padded = F.pad(w_int8, padding) if any(padding) else w_int8.contiguous()
    # Four k's are moved as one int32.
    quads = padded.view(torch.int32).unflatten(0, (-1, NR)).transpose(1, 2)
    packed = pages.empty(*packed_shape(N, K))
    words = packed.view(torch.int32)
    words[:, :-NR].view(quads.shape).copy_(quads)
    torch.sum(padded.view(-1, NR, padded.shape[1]), 2, out=words[:, -NR:])
    return packed


def unpack(packed: Tensor, N: int, K: int) -> Tensor:
    """The ``w_int8 [N, K]`` that was packed."""
    quads = packed.view(torch.int32)[:, :-NR].unflatten(1, (-1, NR))
    w_int8 = quads.transpose(1, 2).contiguous().flatten(0, 1).view(torch.int8)
    return w_int8[:N, :K].contiguous()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = process.loaded() or process.keep(build.load())
    except build.BuildError as error:
        return None, str(error)
    library.int8fx_isas.restype = ctypes.c_char_p
    library.int8fx_use_isa.restype = ctypes.c_bool
    library.int8fx_forbid_data_access.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    library.int8fx_forbid_data_access.restype = None
    return library, None


def _library() -> ctypes.CDLL:
    with _lock:
        library, reason = _load()
    if library is None:
        raise RuntimeError(f"the CPU kernels are not loaded: {reason}")
    return library
