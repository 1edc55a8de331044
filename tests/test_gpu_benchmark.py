"""benchmarks/gpu.py: what measures on a GPU is run through here, on a CPU."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "gpuless"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu
import gpu_model
import specimens

from int8fx.kernels.gpu.gather import launch_shape


def test_the_measuring_half_runs_through_and_contenders_agree(monkeypatch):
    compile_ = torch.compile

    def only_ours(model, backend="inductor", **given):
        return compile_(model, backend=backend, **given) if backend == "llmint8" else model

    monkeypatch.setattr(torch, "compile", only_ours)
    results = []

    def clock(call):
        results.append(call())
        return 0.002

    rehearsal = dataclasses.replace(gpu.REHEARSAL, clock=clock)
    rows = list(rehearsal.measured())
    assert [(name, M) for name, M, _ in rows] == [("two", 1), ("two", 20)]
    for _, _, times in rows:
        assert {"fp16", "int8fx", "int8fx, tuned"} <= times.keys()
        assert set(times.values()) == {2.0}
        (expected, *others), results = results[: len(times)], results[len(times) :]
        for outputs in others:
            for y, float_y in zip(outputs, expected, strict=True):
                assert (y.float() - float_y.float()).norm() < 0.05 * float_y.float().norm()


def test_a_contender_that_is_not_installed_is_left_out(monkeypatch, capsys):
    def missing(_model):
        raise ImportError

    monkeypatch.setattr(gpu, "_bitsandbytes", missing)
    monkeypatch.setattr(gpu, "_torchao", lambda model: model)
    contenders = gpu._contenders(torch.nn.Identity())
    assert "bitsandbytes is not installed, and not compared" in capsys.readouterr().out
    assert "bitsandbytes" not in contenders and "torchao" in contenders


@pytest.fixture
def norms(monkeypatch):
    """Norms as if compiled: 15 instructions an element, 30 with rows quantised, 60 with more."""
    counts = dict.fromkeys(gpu_model.MOVES, 120) | {"token": 240, "scattered": 480}
    row = {kind: {K: (count, K // 256) for K in (4096, 14336)} for kind, count in counts.items()}
    monkeypatch.setattr(gpu, "norm_kernels", lambda: {gpu_.arch: row for gpu_ in gpu_model.GPUS})


H100 = gpu_model.GPUS[0]


def test_a_norm_is_limited_by_memory_or_by_its_instructions():
    memory = gpu_model.norm(H100, 4096, 4096, "fp16", 100, 16)
    assert memory.limit == "memory"
    assert memory.seconds == gpu_model.streaming(H100, 4 * 4096 * 4096)
    issue, twice = (gpu_model.norm(H100, 4096, 4096, "fp16", n, 16) for n in (1000, 2000))
    assert issue.limit == twice.limit == "issue"
    assert twice.seconds - H100.gap == pytest.approx(2 * (issue.seconds - H100.gap))


@pytest.mark.parametrize("quantizes", [True, False])
def test_what_gathers_is_its_loops_as_often_as_they_run(quantizes):
    shape = launch_shape(4096, 4096, quantizes)
    seen = specimens.quantize_gather("sm_90", 4096, 4096, "fp16", quantizes).inspection
    count = functools.partial(gpu_model._gather_instructions, seen, shape)
    of_x, of_w = count(4096, 32, quantizes)
    wider, more = count(8192, 32, quantizes), count(4096, 64, quantizes)
    assert 200 < of_w < 2000
    assert (of_x > 2 * of_w) == quantizes  # rows are quantised, weights are not
    assert wider[0] - of_x > wider[1] - of_w if quantizes else wider[0] - of_x == wider[1] - of_w
    assert 0 < more[0] - of_x <= more[1] - of_w  # more rows of a weight in a step


def test_no_product_is_faster_than_the_perfect_one(norms, monkeypatch):
    """The tables of where the time goes, for a product that takes twice the time of a perfect one."""

    def slow(gpu_, M, N, K):
        return gpu_model.Time(2 * gpu_model.matmul_int8(gpu_, M, N, K), "L2"), "128x256"

    monkeypatch.setattr(gpu, "_product", slow)
    rows = [row.strip("| ").split(" | ") for row in gpu.floors(H100, 4096)]
    assert [name for name, *_ in rows] == [name for name, _, _ in gpu.LAYERS]
    for _, *ratios in rows:
        column, token, none, perfect, scattered, by_bytes = map(float, ratios)
        assert column < perfect < 2 * column
        assert max(column, token) < none
        assert scattered < by_bytes
    parts = [row.strip("| ").split(" | ") for row in gpu.launches(H100, 4096)]
    assert [(name, way) for name, way, *_ in parts] == [
        (name, way) for name, _, _ in gpu.LAYERS for way in ("column", "token")
    ]
    for (name, way, *times), (_, widths, K) in zip(parts[::2], gpu.LAYERS, strict=True):
        seconds = sum(float(time.split(",")[0]) for time in times)
        fastest = gpu._fastest(H100, 4096, sum(widths), K, way)
        assert seconds == pytest.approx(1e6 * fastest.seconds, abs=0.2), name
