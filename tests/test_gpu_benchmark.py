"""benchmarks/gpu.py: what measures on a GPU is run through here, on a CPU."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu


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


def test_no_product_is_faster_than_the_perfect_one(monkeypatch):
    """The second modelled table, for a product that takes twice the time of a perfect one."""
    import gpu_model

    def slow(gpu_, M, N, K):
        around = gpu_model.norm(gpu_, M, K) + gpu_model.quantize_gather(gpu_, M, N, K, gpu.OUTLIERS)
        return around + 2 * gpu_model.matmul_int8(gpu_, M, N, K), "", ""

    monkeypatch.setattr(gpu, "_fastest", slow)
    rows = [row.strip("| ").split(" | ") for row in gpu.floors()]
    assert [name for name, *_ in rows] == [name for name, _, _ in gpu.LAYERS]
    for _, *ratios in rows:
        ours, perfect, not_written = map(float, ratios)
        assert ours < perfect < not_written
        assert perfect < 2 * ours
