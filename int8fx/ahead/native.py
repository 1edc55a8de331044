"""The libraries that run an artefact, called by ctypes: torch's own among them, without its Python.

Loading ``libtorch_cpu.so`` takes a fraction of the time that ``import torch`` takes. The kernels
register themselves with torch's dispatcher as they are loaded. What Python would define of their
operators comes from the artefact.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int8fx.ahead import machine
from int8fx.ahead.artefact import KERNELS, RUNNER, TOKENS, Artefact, Graph, open_trusted
from int8fx.ahead.mapped import DTYPES, Memory
from int8fx.errors import ArtefactError
from int8fx.kernels.cpu import process

TORCH = ("libc10.so", "libtorch_cpu.so", "libtorch.so")

_text, _long, _double, _pointer = ctypes.c_char_p, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
# What each function of runner.cpp takes, and what it returns: a reason, where it can fail.
_FUNCTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "define": ((_text, _text, _text), _text),
    "undefine": ((), None),
    "open": ((_text, _long, _pointer), _text),
    "close": ((_pointer,), None),
    "call": ((_pointer, _text, _text), _text),
    "argument": ((_pointer, ctypes.c_int32, _long), _text),
    "text": ((_pointer, _text), _text),
    "real": ((_pointer, _double), _text),
    "flag": ((_pointer, ctypes.c_int32), _text),
    "none": ((_pointer,), _text),
    "input": ((_pointer, _long, _pointer, ctypes.c_int32, _pointer, _long), _text),
    "run": ((_pointer, _long, _pointer), _text),
    "most_likely": ((_pointer, _long), _long),
    "sample": ((_pointer, _long, _double, _double, _double), _long),
    "threads": ((ctypes.c_int32,), None),
}


_loaded: list["Libraries"] = []


def forget_definitions() -> None:
    """Leaves it to Python to define the operators of int8fx, as it does where torch is imported."""
    for libraries in _loaded:
        libraries("undefine")


class Libraries:
    """What runs an artefact's programs.

    Attributes:
        folder: the artefact's, by a descriptor: what was looked at is what is opened.
    """

    def __init__(self, artefact: Artefact) -> None:
        """Raises:
        ArtefactError: a library cannot be loaded, or may not; names it.
        """
        names = [KERNELS, RUNNER, *(f"{name}.so" for name in artefact.programs)]
        self._artefact = artefact
        self.folder = Path(f"/proc/self/fd/{open_trusted(artefact, names)}")
        _load_torch()
        if process.loaded() is None:
            process.keep(self._load(KERNELS))
        self._runner = self._load(RUNNER)
        for name, (takes, returns) in _FUNCTIONS.items():
            function = getattr(self._runner, f"int8fx_ahead_{name}")
            function.argtypes, function.restype = takes, returns
        for name, overload, schema in artefact.operators:
            self("define", name.encode(), overload.encode(), schema.encode())
        _loaded.append(self)

    def _load(self, name: str) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(self.folder / name))
        except OSError as error:
            raise ArtefactError(f"{self._artefact.path(name)}: cannot be loaded: {error}") from error

    def __call__(self, name: str, *args: Any) -> Any:
        """A function of ``runner.cpp``.

        Raises:
            ArtefactError: it failed.
        """
        result = getattr(self._runner, f"int8fx_ahead_{name}")(*args)
        if _FUNCTIONS[name][1] is _text and result is not None:
            reason = (result.decode(errors="replace").splitlines() or ["failed"])[0]
            raise ArtefactError(f"{self._artefact.folder}: {reason}")
        return result


def _load_torch() -> None:
    folder = machine.torch_libraries()
    for name in TORCH:
        try:
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtefactError(f"{folder / name}: cannot be loaded: {error}") from error


# The arguments of an operator that change from call to call, as runner.cpp numbers them.
_CHANGING = ("tensor", "tensors", "int", "ints")


class Program:
    """A compiled graph with its inputs."""

    def __init__(
        self,
        libraries: Libraries,
        name: str,
        graph: Graph,
        memory: Mapping[str, Memory],
        vocabulary: int,
    ) -> None:
        """
        Args:
            memory: where each input is, but for ``TOKENS``.
            vocabulary: how many logits it gives.

        Raises:
            ArtefactError: it cannot be loaded, or an input is not there.
        """
        self._libraries, self._vocabulary = libraries, vocabulary
        self._tokens = graph.inputs.index(TOKENS)
        self.logits = (ctypes.c_float * vocabulary)()
        self._handle = _pointer()
        library = str(libraries.folder / f"{name}.so").encode()
        libraries("open", library, len(graph.inputs), ctypes.byref(self._handle))
        for operator, overload, arguments in graph.calls:
            self._call("call", operator.encode(), overload.encode())
            for kind, value in arguments:
                self._add_argument(kind, value)
        for position, each in enumerate(graph.inputs):
            if each != TOKENS:
                self._set(position, memory[each])

    def _add_argument(self, kind: str, value: Any) -> None:
        if kind in _CHANGING:
            self._call("argument", _CHANGING.index(kind), value)
        elif kind == "none":
            self._call("none")
        else:
            self._call(kind, value.encode() if kind == "text" else value)

    def _call(self, name: str, *args: Any) -> None:
        self._libraries(name, self._handle, *args)

    def __call__(self, tokens: list[int]) -> None:
        """Runs it on tokens that come behind those of the cache; ``logits`` are of the last one.

        Raises:
            ArtefactError: it failed.
        """
        given = (_long * len(tokens))(*tokens)
        self._set(self._tokens, Memory(ctypes.addressof(given), "I64", (1, len(tokens))))
        self._call("run", self._vocabulary, self.logits)

    def _set(self, position: int, memory: Memory) -> None:
        shape = (_long * len(memory.shape))(*memory.shape)
        dtype = DTYPES[memory.dtype].number
        self._call("input", position, memory.address, dtype, shape, len(memory.shape))

    def most_likely(self) -> int:
        """Of the tokens that may come next."""
        return self._libraries("most_likely", self.logits, self._vocabulary)

    def sampled(self, temperature: float, top_p: float, uniform: float) -> int:
        """One of the most likely whose probabilities add up to ``top_p``, by a number in [0, 1)."""
        return self._libraries("sample", self.logits, self._vocabulary, temperature, top_p, uniform)

    def __del__(self) -> None:
        if self._handle:
            self._call("close")
