"""The option ``background``: a graph runs operator by operator until Inductor is done with it.

    this process     calls run the operators of the rewritten graph one by one
    a fork of it     AOTAutograd and Inductor; their caches keep what they make
    this process     the first call after the fork has ended reads the caches, and runs compiled code

The fork has in memory all that the compile needs, and takes no time of this process's interpreter. It
ends by itself, after this process if need be: the caches are for the next one as well.

torch's own asynchronous mode (``TORCHINDUCTOR_FX_COMPILE_MODE=async+subprocess`` in torch 2.13)
compiles a graph in this process before it begins the compile in another one.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from int8fx import torch_private
from int8fx.compiler.compilation import Compilation
from int8fx.kernels.devices import host_reads_all

log = logging.getLogger(__name__)

NO_DEVICE = "the graph is not on a CPU alone, and a fork has no other device"
GRADIENTS = "a gradient may be asked for"
RELEASES = "release_weights gives up weights as the graph is compiled"
NO_FORKS = "this system does not fork"


def refusal(compilation: Compilation) -> str:
    """Why a graph is compiled at once, or empty."""
    if not host_reads_all(compilation.devices):
        return NO_DEVICE
    if compilation.needs_autograd:
        return GRADIENTS
    if compilation.options.release_weights:
        return RELEASES
    return "" if hasattr(os, "fork") else NO_FORKS


class CompiledLater:
    """A callable with a graph's signature, which changes from one form of it to another.

    Dynamo checks at each call the conditions on sizes that it knew of when the backend was done. Where
    Inductor has more of them, its code is for some sizes only, and the graph stays as it is.

    Args:
        eager: runs the graph now.
        compile_graph: makes the form that runs it afterwards. It is called twice: in a fork, which
            fills the caches, and here, where it finds them filled.
        conditions: on sizes, so far.
    """

    def __init__(
        self,
        eager: Callable[..., Any],
        compile_graph: Callable[[], Callable[..., Any]],
        conditions: Callable[[], list[str]],
    ) -> None:
        self._run, self._compile, self._conditions = eager, compile_graph, conditions
        self._began = time.monotonic()
        self._changing = threading.Lock()
        self._child: int | None = _forked(compile_graph)
        log.info("a graph runs operator by operator while process %d compiles it", self._child)

    def __call__(self, *args: Any) -> Any:
        if self._child is not None and self._changing.acquire(blocking=False):
            try:
                self._change_if_done()
            finally:
                self._changing.release()
        return self._run(*args)

    def _change_if_done(self) -> None:
        if self._child is None:  # by another thread, meanwhile
            return
        done, status = os.waitpid(self._child, os.WNOHANG)
        if not done:
            return
        self._child = None
        if status:
            log.warning("the compile in the background failed (status %d): compiling here", status)
        known = self._conditions()
        compiled = self._compile()
        more = [each for each in self._conditions() if each not in known]
        del self._compile, self._conditions
        if more:
            log.warning("a graph stays operator by operator: compiled, it wants %s", "; ".join(more))
            return
        self._run = compiled
        log.info("a graph runs compiled from now on, %.1f s later", time.monotonic() - self._began)


def _forked(work: Callable[[], Any]) -> int:
    """Does some work in a fork of this process; the fork's id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.nice(5)  # this process answers meanwhile
        # The threads of a pool are not there in a fork, and what waits for them waits for ever.
        torch.set_num_threads(1)
        with torch_private.compiling_alone():
            work()
        status = 0
    except BaseException:
        log.warning("the compile in the background failed", exc_info=True)
    finally:
        os._exit(status)
