"""Threads quantise each weight once; processes share what is packed."""

import contextlib
import dataclasses
import gc
import os
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import int8fx
from int8fx.compiler.swap import Slot, WeightSwap
from int8fx.kernels import forks, packing
from int8fx.kernels.formats import int8
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.testing.support import assert_close_to_float64, interpreted
from int8fx.weights.store import STORE, WeightStore

K, N = 64, 96


def test_first_calls_from_many_threads_quantise_once():
    quantized = []

    def quantize(matrix):
        quantized.append(matrix)
        return int8.PER_CHANNEL.quantize(matrix)

    kept = dataclasses.replace(int8.PER_CHANNEL, name="counted", quantize=quantize)
    weights = [torch.randn(N, K) for _ in range(6)]
    store = WeightStore()
    slots = [Slot(position, WeightExpression(None, ()), kept, False) for position in range(6)]
    swaps = [WeightSwap(slots, [], store) for _ in range(4)]
    barrier = threading.Barrier(8)

    def first_call(number):
        barrier.wait()
        return [id(part) for part in swaps[number % 4](weights)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(first_call, range(8)))
    assert len(quantized) == 6
    assert all(parts == found[0] for parts in found)


def test_threads_call_one_compiled_model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    linear = int8fx.quantize_(nn.Linear(K, N))
    compiled = torch.compile(linear, backend="llmint8", dynamic=True)
    inputs = [torch.randn(rows, K) for rows in (2, 3, 5, 8) * 4]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(compiled, inputs))
    for x, y in zip(inputs, outputs, strict=True):
        assert torch.equal(y, linear(x))


def _work(model, x, results):
    # Plain values: a tensor in the queue would be lost with the process that sent it.
    weight = model.weight
    first = weight.packed[0, 0].item()
    results.put((weight.packed.is_shared(), first, model(x).tolist()))
    weight.packed[0, 0] = first + 1  # seen by the parent, if the memory is shared


def test_worker_processes_share_the_packed_weights():
    torch.manual_seed(0)
    model = int8fx.quantize_(nn.Linear(K, N)).requires_grad_(False)
    model.share_memory()
    x = torch.randn(3, K)
    expected, first = model(x), model.weight.packed[0, 0].item()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=_work, args=(model, x, results))
    worker.start()
    shared, seen, y = results.get()
    assert shared and seen == first
    assert y == expected.tolist()
    worker.join()
    assert model.weight.packed[0, 0].item() == first + 1


# --- what one thread does while another one packs ------------------------------------------------


class BothWays(nn.Module):
    """A weight that is packed in two forms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, K), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + 2 * (x @ self.weight)


def test_a_weight_that_changes_between_its_two_forms_is_packed_again(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = BothWays(), torch.randn(8, K)
    call = interpreted(model)
    call(x)
    packed = []

    def pack(*args):
        packed.append(original(*args))
        if len(packed) == 1:
            model.weight.mul_(-3)
        return packed[-1]

    original = packing.pack
    monkeypatch.setattr(packing, "pack", pack)
    model.weight.mul_(2)
    call(x)  # one form is of the weight before, the other of that after
    weight = model.weight.double()
    for _ in range(2):
        assert_close_to_float64(call(x), x.double() @ (weight.t() + 2 * weight), K)


@contextlib.contextmanager
def held(lock):
    """A lock that another thread holds."""
    taken, done = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def used(tensor):
    """A swap that has seen a weight of the process's store, and the packed weight."""
    swap = WeightSwap([Slot(0, WeightExpression(None, ()), int8.PER_CHANNEL, False)], [], STORE)
    return swap, weakref.ref(swap([tensor])[0])


def test_a_weight_goes_without_waiting_for_the_store():
    """Garbage is collected in any thread, which may hold what the one that packs waits for."""
    weights = [nn.Parameter(torch.randn(N, K), requires_grad=False)]
    swap, packed = used(weights[0])
    assert packed() is not None
    thread = threading.Thread(target=weights.clear, daemon=True)
    with held(STORE.lock):
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        assert packed() is None  # neither the store nor the swap, which is still there, has it
    del swap


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    """As a worker of a DataLoader does not: what holds the locks stays behind."""
    weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    used(weight)
    assert STORE.lock in forks.FREED
    with contextlib.ExitStack() as stack:
        for lock in forks.FREED:
            stack.enter_context(held(lock))
        child = os.fork()
        if child == 0:
            STORE.changed([weight])
            used(weight)
            weight = None
            gc.collect()
            os._exit(not all(lock.acquire(blocking=False) for lock in forks.FREED))
        deadline = time.monotonic() + 30
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if found == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert found == (child, 0)


def test_graphs_are_compiled_while_weights_change():
    """Every new graph joins those that are told of a change."""
    store, weight = WeightStore(), torch.randn(4, K)
    slots = [Slot(0, WeightExpression(None, ()), int8.PER_CHANNEL, False)]
    swaps = [WeightSwap(slots, [], store) for _ in range(2000)]
    stop = threading.Event()

    def compile_more():
        while not stop.is_set():
            swaps[:100] = []
            swaps.extend(WeightSwap(slots, [], store) for _ in range(100))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=compile_more)
    thread.start()
    try:
        for _ in range(1000):
            store.get(weight, slots[0].expression, int8.PER_CHANNEL)
            store.clear()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
