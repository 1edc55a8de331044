"""Threads quantise each weight once; processes share what is packed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.multiprocessing as multiprocessing
from torch import nn

import int8fx
from int8fx.kernels.schemes import int8
from int8fx.passes.weight_expression import WeightExpression
from int8fx.weights import Slot, WeightStore, WeightSwap

K, N = 64, 96


def test_first_calls_from_many_threads_quantise_once():
    quantized = []

    def quantize(matrix):
        quantized.append(matrix)
        return int8.pack_per_channel(matrix)

    kept = int8.WeightFormat("counted", int8.PER_CHANNEL.parts, quantize, int8.dequantize)
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
