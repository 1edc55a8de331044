"""Programs of a launch side by side: in any order, interleaved at every access to memory.

    simulate(kernel, seed=0, resident=2)[grid](*cpu_tensors, BLOCK=64)

Triton's interpreter runs one program after another, and all see a store at once: no order of programs
ever shows. Here ``resident`` of them are in flight, taken in random order. Whenever one loads, stores
or counts, a draw says who goes on. The same seed gives the same run.

Memory is as weak as a GPU's:

- Other programs see a store at some later time, each element at its own. An atomic with release
  semantics publishes what came before the last barrier, and so does the end of the launch.
- A load may return what a place held before another program's store, unless an atomic with acquire
  semantics came since that store was published.
- An atomic is one step, on the memory that all share.
- A load of what the program itself has stored since its last barrier is wrong in any order, since
  threads store at different times: ``MissingBarrier``.
- A program may wait for one that is in flight, and for no other: ``Stuck``.

``without`` takes away what a kernel relies on. A test that passes then, too, has shown nothing.
"""

import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import triton.runtime.interpreter as stock
from triton._C.libtriton import interpreter as raw
from triton._C.libtriton import ir

from .interpreter import interpret
from .weak_memory import Memory, MissingBarrier, View

__all__ = ["GUARDS", "MissingBarrier", "Stuck", "simulate"]

# What a control can do without. Without atomics, one is a load and a store.
GUARDS = ("barriers", "atomics", "release", "acquire")
_MOST_TURNS = 10_000  # until one of the programs in flight has ended
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class Stuck(AssertionError):
    """The programs in flight wait for one another, or for one that has not started."""


class _Abandoned(BaseException):
    """Ends the other programs of a launch that has failed."""


def simulate(
    kernel: Any, seed: int = 0, resident: int = 2, without: Collection[str] = ()
) -> "Launcher":
    """A kernel whose programs run side by side; launch it as ``simulate(kernel)[grid](...)``.

    Args:
        kernel: a ``@triton.jit`` function.
        seed: draws the order of programs, and of their accesses.
        resident: how many programs are in flight at once; 1, one after another in random order.
        without: some of ``GUARDS``.

    Raises:
        ValueError: a guard of another name, or no program in flight.
        MissingBarrier, Stuck: in the launch; see above.
    """
    if unknown := set(without) - set(GUARDS):
        raise ValueError(f"without {', '.join(sorted(unknown))}; known: {', '.join(GUARDS)}")
    if resident < 1:
        raise ValueError(f"{resident} programs in flight; it takes at least 1")
    return Launcher(interpret(kernel), seed, resident, frozenset(without))


class Launcher:
    """What ``simulate`` returns."""

    def __init__(self, twin: Any, seed: int, resident: int, without: frozenset[str]) -> None:
        self._twin, self._settings = twin, (seed, resident, without)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            programs = _Launch(self._twin.rewrite(), *self._settings)
            executor = stock.GridExecutor(programs.collector(), self._twin.arg_names, grid)
            try:
                executor(*args, **kwargs)
            except stock.InterpreterError:
                if programs.error is not None:  # which the interpreter has made a string of
                    raise programs.error from None
                raise

        return launch


class _Program:
    """One program, in a thread of its own, which runs while it has the turn."""

    def __init__(
        self, launch: "_Launch", index: tuple[int, int, int], body: Callable[[], None]
    ) -> None:
        self.index = index
        self.view = View(launch.memory, launch.without)
        self.turn = threading.Semaphore(0)
        self.ended = False
        self._launch, self._body = launch, body
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            self._body()
        except _Abandoned:
            pass
        except Exception as error:
            self._launch.fail(error)
        self.ended = True
        self._launch.turn.release()


class _Launch:
    """All programs of a launch, of which one has the turn."""

    def __init__(
        self, function: Callable[..., None], seed: int, resident: int, without: frozenset[str]
    ) -> None:
        self.memory, self.without = Memory(seed), without
        self.turn = threading.Semaphore(0)
        self.error: Exception | None = None
        self._function, self._resident = function, resident
        self._indices: list[tuple[int, int, int]] = []

    def collector(self) -> Callable[..., None]:
        """Stands for the kernel where the interpreter calls it once for each program."""

        def collect(**arguments: Any) -> None:
            builder = stock.interpreter_builder
            self._indices.append(builder.grid_idx)
            if len(self._indices) == math.prod(builder.grid_dim):
                self._run(lambda: self._function(**arguments))

        collect.__signature__ = inspect.signature(self._function)  # type: ignore[attr-defined]
        collect.__annotations__ = self._function.__annotations__
        return collect

    def fail(self, error: Exception) -> None:
        self.error = self.error or error

    def _run(self, body: Callable[[], None]) -> None:
        chance, waiting = self.memory.random, list(self._indices)
        chance.shuffle(waiting)
        flight: list[_Program] = []
        views: list[View] = []
        turns = 0
        with self._as_the_builder():
            while (waiting or flight) and self.error is None:
                while waiting and len(flight) < self._resident:
                    flight.append(_Program(self, waiting.pop(), body))
                    views.append(flight[-1].view)
                self._let_go_on(chance.choice(flight))
                turns = 0 if any(program.ended for program in flight) else turns + 1
                flight = [program for program in flight if not program.ended]
                chance.choice(views).publish_some()
                if turns > _MOST_TURNS:
                    self.fail(Stuck(f"{len(flight)} programs in flight, and {len(waiting)} to come"))
            for program in flight:
                self._let_go_on(program)  # to its end: the launch has failed
        chance.shuffle(views)
        for view in views:
            view.publish(view.pending)
        if self.error is not None:
            raise self.error

    def _let_go_on(self, program: _Program) -> None:
        self._current = program
        stock.interpreter_builder.grid_idx = program.index
        program.turn.release()
        self.turn.acquire()

    def _pause(self) -> View:
        """Gives the turn away, and returns what the program sees when it has it again."""
        program = self._current
        self.turn.release()
        program.turn.acquire()
        if self.error is not None:
            raise _Abandoned
        return program.view

    @contextlib.contextmanager
    def _as_the_builder(self) -> Iterator[None]:
        """The interpreter's accesses to memory are made here."""
        builder = stock.interpreter_builder
        hooks = {
            "create_masked_load": self._load,
            "create_masked_store": self._store,
            "create_atomic_rmw": self._atomic_rmw,
            "create_atomic_cas": self._atomic_cas,
            "create_barrier": self._barrier,
        }
        vars(builder).update(hooks)
        try:
            yield
        finally:
            for name in hooks:
                delattr(builder, name)

    # What follows the mask are hints for caches, whose number differs between releases of triton.
    def _load(self, pointers: Any, mask: Any, other: Any, *hints: Any) -> Any:
        dtype = pointers.get_element_ty()
        numpy_dtype = stock._get_np_dtype(dtype)
        rest = np.zeros_like(pointers.data, numpy_dtype) if other is None else other.data
        view = self._pause()
        try:
            loaded = raw.load(pointers.data, mask.data, rest, numpy_dtype)
            return stock.TensorHandle(view.load(pointers.data, loaded, mask.data), dtype)
        except MissingBarrier as error:  # of which a nested call would make a string
            self.fail(error)
            raise _Abandoned from None

    def _store(self, pointers: Any, value: Any, mask: Any, *hints: Any) -> None:
        self._pause().store(pointers.data, value.data, mask.data)

    def _barrier(self) -> None:
        self._pause().barrier()

    def _atomic_rmw(
        self, kind: Any, pointer: Any, value: Any, mask: Any, order: Any, scope: Any
    ) -> Any:
        builder = stock.interpreter_builder
        operation = builder.ir_rmw_op_to_interpreter_rmw_op[kind]
        relaxed = builder.ir_sem_to_interpreter_sem[order]
        return self._atomic(
            pointer,
            value.dtype.scalar,
            order,
            mask.data,
            lambda places: raw.atomic_rmw(operation, places, value.data, mask.data, relaxed),
        )

    def _atomic_cas(self, pointer: Any, expected: Any, value: Any, order: Any, scope: Any) -> Any:
        relaxed = stock.interpreter_builder.ir_sem_to_interpreter_sem[order]
        return self._atomic(
            pointer,
            expected.dtype.scalar,
            order,
            np.ones_like(pointer.data, bool),
            lambda places: raw.atomic_cas(places, expected.data, value.data, relaxed),
        )

    def _atomic(
        self,
        pointer: Any,
        dtype: Any,
        order: Any,
        mask: np.ndarray,
        run: Callable[[np.ndarray], np.ndarray],
    ) -> Any:
        if "atomics" in self.without:
            return self._load_and_store(pointer, dtype, mask, run)
        view = self._pause()
        view.before_atomic(pointer.data, order in _RELEASES)
        before = run(pointer.data)
        for address, old, wanted in zip(pointer.data.flat, before.flat, mask.flat, strict=True):
            if wanted:
                self.memory.remember(int(address), old)
                view.floor[int(address)] = self.memory.time
        view.after_atomic(order in _ACQUIRES)
        return stock.TensorHandle(before, dtype)

    def _load_and_store(
        self, pointer: Any, dtype: Any, mask: np.ndarray, run: Callable[[np.ndarray], np.ndarray]
    ) -> Any:
        before = self._load(pointer, stock.TensorHandle(mask, stock.tl.int1), None)
        after = np.ascontiguousarray(before.data)  # which the atomic changes, in place of memory
        before = after.copy()
        first = after.ctypes.data
        places = first + after.itemsize * np.arange(after.size, dtype=np.uint64).reshape(after.shape)
        run(places.astype(np.uint64))
        self._pause().store(pointer.data, after, mask)
        return stock.TensorHandle(before, dtype)
