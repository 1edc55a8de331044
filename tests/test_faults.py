"""Bad weights, inputs and machines: the right answer or a clear error, and the model left alone."""

import copy
import multiprocessing
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx
from int8fx.compiler import pipeline
from int8fx.kernels import table
from int8fx.kernels.cpu import build
from int8fx.kernels.ops.quantize_reference import (
    MAX_K,
    MIN_SCALE,
    QMAX,
    quantize_weight,
)
from int8fx.testing.bounds import expected_and_bound
from int8fx.testing.checked import checking
from int8fx.testing.support import compile_once
from int8fx.weights.store import STORE

K, N, M = 32, 24, 5


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(K, N, dtype=dtype).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_is_not_finite_spoils_its_own_channel_and_no_other(x, value, dtype):
    model, x = linear(dtype), x.to(dtype)
    model.weight[3, 5] = value
    model.weight[7, 0] = value
    y, report = compile_once(model, x)
    assert len(report.accepted) == 1
    spoilt = torch.tensor([3, 7])
    assert not y[:, spoilt].isfinite().any()
    healthy = [n for n in range(N) if n not in spoilt]
    expected, bound = expected_and_bound(x, model.weight[healthy], model.bias[healthy], 6.0, "column")
    assert ((y[:, healthy].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_experts_with_such_a_weight_as_well(value):
    weight = torch.randn(2, N, K)
    weight[1, 3, 5] = value
    _, w_scale = quantize_weight(weight)
    assert not w_scale[1, 3].isfinite()
    assert w_scale.isfinite().sum() == 2 * N - 1


def test_a_row_of_zeros_and_a_weight_of_subnormals(x):
    model = linear()
    model.weight[2] = 0
    model.weight[4] = 1e-39  # the scale would be below the smallest normal number
    model.weight[6] = torch.where(torch.arange(K) == 1, 2.0**-126 * 127, 0.0)
    with checking() as seen, torch.no_grad():
        torch._dynamo.reset()
        y = torch.compile(model, backend="llmint8")(x)
    assert seen.worst <= 1
    assert (y[:, 2] == model.bias[2]).all()
    assert (quantize_weight(model.weight)[1] >= MIN_SCALE).all()


@pytest.mark.parametrize("decomposition", ["column", "token"])
def test_rows_of_x_that_are_zero_subnormal_or_nearly_so(x, decomposition):
    model = linear()
    x[0], x[1], x[2] = 0, 1e-39, 2.0**-126
    x[3] = torch.where(torch.arange(K) == 1, 1e-45, 0.0)
    y, report = compile_once(model, x, backend_options={"decomposition": decomposition})
    assert len(report.accepted) == 1
    expected, bound = expected_and_bound(x, model.weight, model.bias, 6.0, decomposition)
    assert ((y.double() - expected).abs() <= bound).all()
    assert (y[0] == model.bias).all()


@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_fp16_products_overflow_where_float_does_and_nowhere_else(threshold, decomposition):
    torch._dynamo.reset()
    largest = torch.finfo(torch.float16).max
    weight = torch.zeros(4, K, dtype=torch.float16)
    weight[0], weight[1, 0], weight[2, :2], weight[3] = largest, 1.0, 0.5, 1e-4
    model = nn.Linear(K, 4, bias=False, dtype=torch.float16).requires_grad_(False)
    model.weight.copy_(weight)
    x = torch.full((2, K), largest, dtype=torch.float16)
    given = {"threshold": threshold, "decomposition": decomposition}
    y, _ = compile_once(model, x, backend_options=given)
    assert (y[:, 0] == torch.inf).all()  # 32 · 65504² is past fp16, and far from past fp32
    torch.testing.assert_close(
        y[:, 1:], F.linear(x.float(), weight[1:].float()).half(), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (0, 3, K)], ids=str)
def test_empty_batches(shape):
    y, report = compile_once(linear(), torch.empty(shape))
    assert y.shape == (*shape[:-1], N)
    assert len(report.accepted) == 1


# --- the bound on K -------------------------------------------------------------------------------


def test_int32_holds_every_sum_up_to_the_largest_k_and_not_past_it():
    assert MAX_K * QMAX * QMAX <= 2**31 - 1 < (MAX_K + 1) * QMAX * QMAX


def test_the_largest_k_is_computed_exactly_and_one_more_is_refused():
    # Every product is 127 · 127: the largest sum that there can be.
    for size, accepted in ((MAX_K, True), (MAX_K + 1, False)):
        model = nn.Linear(size, 1, bias=False).requires_grad_(False)
        nn.init.ones_(model.weight)
        y, report = compile_once(model, torch.ones(1, size))
        assert report.decisions[0].accepted is accepted
        assert y.item() == pytest.approx(size, rel=1e-6)
    assert f"K = {MAX_K + 1} could overflow an int32 sum (at most {MAX_K})" in str(report)


# --- faults while compiling -----------------------------------------------------------------------


def state(model):
    return {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}


def assert_left_alone(model, before):
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0], name
        assert torch.equal(value, before[name][1]), name


def test_out_of_memory_while_packing_is_an_error_and_the_next_call_works(x, monkeypatch):
    torch._dynamo.reset()
    model = linear()
    before, pack = state(model), table.pack
    compiled = torch.compile(model, backend="llmint8")

    def out_of_memory(*weight):
        raise MemoryError("no room for int8 [24, 32]")

    monkeypatch.setattr(table, "pack", out_of_memory)
    with pytest.raises(Exception, match=r"no room for int8 \[24, 32\]"):
        compiled(x)
    assert_left_alone(model, before)
    assert not any(map(STORE.forms, model.parameters()))
    monkeypatch.setattr(table, "pack", pack)
    torch._dynamo.reset()
    assert not torch.equal(compiled(x), model(x))  # in int8
    assert_left_alone(model, before)


def test_out_of_memory_while_packing_again_leaves_no_stale_weight(x, monkeypatch):
    torch._dynamo.reset()
    model, pack = linear(), table.pack
    compiled = torch.compile(model, backend="llmint8")
    compiled(x)
    model.weight.mul_(-2)

    def out_of_memory(*weight):
        raise MemoryError("no room")

    monkeypatch.setattr(table, "pack", out_of_memory)
    with pytest.raises(MemoryError, match="no room"):
        compiled(x)
    monkeypatch.setattr(table, "pack", pack)
    expected, bound = expected_and_bound(x, model.weight, model.bias, 6.0, "column")
    assert ((compiled(x).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("module", "step"),
    [(table, "pack"), (pipeline, "quantize_weights"), (pipeline, "codegen"), (pipeline, "report")],
    ids=["pack", "quantize_weights", "codegen", "report"],
)
def test_an_interrupt_at_any_step_leaves_the_model_and_the_next_call_works(
    x, monkeypatch, module, step
):
    torch._dynamo.reset()
    model = linear()
    before = state(model)

    def interrupted(*_):
        raise KeyboardInterrupt

    compiled = torch.compile(model, backend="llmint8", options={"release_weights": step == "codegen"})
    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled(x)
    assert_left_alone(model, before)
    expected, bound = expected_and_bound(x, model.weight, model.bias, 6.0, "column")
    with int8fx.collect_reports() as reports:
        y = compiled(x)
    assert len(reports[0].accepted) == 1
    assert ((y.double() - expected).abs() <= bound).all()


# --- the machine ----------------------------------------------------------------------------------


def fake_compiler(folder, script):
    """A C++ compiler that tells its version and otherwise runs a shell script."""
    compiler = folder / "fake-g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\n{script}\n')
    compiler.chmod(0o755)
    return compiler


FAILS = 'echo "x.cpp:1: error: no space left on device" >&2; exit 1'
WRITES = """
while [ "$1" != -o ]; do shift; done
printf half > "$2"; sleep 0.5; printf whole > "$2"
"""


def test_a_compiler_that_fails_is_named_and_leaves_nothing_half_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, FAILS)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=r"fake-g\+\+ failed: x.cpp:1: error: no space left"):
        build.build()
    assert list((tmp_path / "cache" / "int8fx").iterdir()) == []


def test_without_the_cpp_kernels_the_reference_serves_and_the_report_says_why(tmp_path):
    code = (
        "import torch, int8fx\n"
        "from int8fx.kernels.cpu import build\n"
        f"build.find_compiler = lambda: [{str(fake_compiler(tmp_path, FAILS))!r}]\n"
        "torch.manual_seed(0)\n"
        "model, x = torch.nn.Linear(32, 24).requires_grad_(False), torch.randn(5, 32)\n"
        "with int8fx.collect_reports() as reports:\n"
        "    y = torch.compile(model, backend='llmint8')(x)\n"
        "error = (y - model(x)).norm() / model(x).norm()\n"
        "assert 0 < error < 0.02, error\n"
        "print(reports[0].kernel['cpu'])\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("plain PyTorch ("), done.stderr[-2000:]
    assert "fake-g++ failed: x.cpp:1: error: no space left on device" in done.stdout


def test_a_cache_that_cannot_be_written_to_is_passed_over(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("no directory can be made here")
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, WRITES)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(elsewhere))
    assert elsewhere in build.build().parents
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(blocked))
    with pytest.raises(build.BuildError, match=r"no writable directory for it: tried .*file/int8fx/"):
        build.build()


def test_inductors_cache_that_cannot_be_written_to_is_named_and_the_next_call_works(
    x, tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("no directory can be made here")
    torch._dynamo.reset()
    model = linear()
    before = state(model)
    compiled = torch.compile(model, backend="llmint8")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(blocked / "cache"))
        with pytest.raises(Exception, match=re.escape(str(blocked / "cache"))):
            compiled(x)
    assert_left_alone(model, before)
    expected, bound = expected_and_bound(x, model.weight, model.bias, 6.0, "column")
    assert ((compiled(x).double() - expected).abs() <= bound).all()


def test_processes_race_for_one_cache_and_a_killed_one_leaves_it_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, WRITES)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    killed, *others = (context.Process(target=build.build) for _ in range(3))
    killed.start()
    deadline = time.time() + 60
    while not list(tmp_path.glob("cache/int8fx/*/*.so")) and time.time() < deadline:
        time.sleep(0.01)
    killed.kill()  # its compiler has written half of the library
    killed.join()
    assert not list(tmp_path.glob("cache/int8fx/*.so"))
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    (library,) = tmp_path.glob("cache/int8fx/*.so")
    assert library.read_text() == "whole"
    assert build.build() == library


def test_deepcopy_after_a_compile_is_a_model_of_its_own(x):
    torch._dynamo.reset()
    model = linear()
    compiled = torch.compile(model, backend="llmint8")
    y = compiled(x)
    twin = copy.deepcopy(model)
    twin.weight.mul_(2)
    assert torch.equal(compiled(x), y)


def test_two_processes_fill_one_compile_cache_at_the_same_time(tmp_path):
    code = (
        "import torch\n"
        "torch.manual_seed(0)\n"
        "model, x = torch.nn.Linear(32, 24).requires_grad_(False), torch.randn(5, 32)\n"
        "y = torch.compile(model, backend='llmint8')(x)\n"
        "error = (y - model(x)).norm() / model(x).norm()\n"
        "assert 0 < error < 0.02, error\n"
        "print(y.sum().item())\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1]
