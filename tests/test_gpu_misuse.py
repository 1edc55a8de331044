"""Misuse of the GPU path, and GPUs that it does not run on: an error or a refusal that says why."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from int8fx.kernels import table
from int8fx.kernels.gpu import device
from int8fx.testing.support import compile_once

pytest.importorskip("triton")

from int8fx.kernels.gpu.experts import expert_linear
from int8fx.kernels.gpu.launch import run
from int8fx.kernels.gpu.linear import int8_linears_gpu
from int8fx.kernels.gpu.norm import norm_kernel
from int8fx.kernels.gpu.normed import normed_linears


def gpu(name: str, major: int, minor: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor)


def test_on_a_gpu_without_int8_mma_linears_stay_in_float(monkeypatch):
    """The CPU's row of the table is the GPU's here, loaded on a GPU that is too old."""
    reason = device.unsupported(gpu("Tesla V100", 7, 0))
    row = dataclasses.replace(table.KERNELS[table.key_of("cuda")], load=lambda: reason)
    monkeypatch.setitem(table.KERNELS, table.key_of("cpu"), row)
    table.kernel_for.cache_clear()
    model, x = torch.nn.Linear(16, 8).requires_grad_(False), torch.randn(3, 16)
    try:
        y, report = compile_once(model, x)
        with pytest.raises(ValueError, match="Tesla V100 is sm_70; int8 matrix"):
            table.pack(torch.zeros(8, 16, dtype=torch.int8))
    finally:
        table.kernel_for.cache_clear()
    (decision,) = report.decisions
    assert not decision.accepted
    assert decision.reason == f"no int8 kernel for device 'cpu': {reason}"
    assert report.kernel["cpu"] == f"none ({decision.reason})"
    torch.testing.assert_close(y, model(x))


def test_which_gpus_serve(monkeypatch):
    for too_old in (gpu("P100", 6, 0), gpu("T4", 7, 5)):
        assert f"{too_old.name} is sm_{too_old.major}" in device.unsupported(too_old)
    assert device.unsupported(gpu("A100", 8, 0)) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device.unsupported(SimpleNamespace(gcnArchName="gfx942:sramecc+")) is None
    assert "gfx1100 is none of gfx90a" in device.unsupported(SimpleNamespace(gcnArchName="gfx1100"))


@pytest.mark.parametrize(
    ("rows", "given"), [(17, "has 17"), (torch.SymInt, "has a number that varies")]
)
def test_weight_only_int8_of_many_rows_would_lose_time(rows, given):
    assert given in device.slower("w8a16", rows)
    assert device.slower("w8a16", 16) == ""
    assert device.slower("llm.int8", rows) == ""


def operands(x_dtype=torch.float16, w_dtype=torch.int8, w_device="cpu", K=16) -> tuple:
    x = torch.zeros(3, 16, dtype=x_dtype)
    weight = torch.zeros(8, K, dtype=w_dtype, device=w_device)
    return x, 6.0, "column", [weight], [torch.ones(8, device=w_device)], []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"w_device": "meta"}, ValueError, "x is on cpu, and a weight on meta"),
        ({"x_dtype": torch.float64}, TypeError, "x is torch.float64; allowed: torch.float32"),
        ({"w_dtype": torch.float16}, ValueError, r"torch.float16 \[8, 16\].*int8 \[N, 16\]"),
        ({"K": 32}, ValueError, r"torch.int8 \[8, 32\].*int8 \[N, 16\]"),
    ],
    ids=["device", "input dtype", "weight dtype", "width"],
)
def test_operands_that_do_not_go_together(given, error, message):
    with pytest.raises(error, match=message):
        int8_linears_gpu(*operands(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": "batch"}, "norm 'batch'.* allowed: 'rms', 'rms, rounded', 'layer'"),
        ({"decomposition": "all"}, "decomposition 'all'.*'column' or 'token'"),
        ({"threshold": 0.0}, "threshold 0.0; .* not 0"),
        ({"weights": []}, "1 to 3 linears, .* given 0 weights"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_norm_and_linears_that_the_operator_does_not_take(given, message):
    x, threshold, decomposition, weights, w_scales, biases = operands()
    whole = {
        "x": x,
        "addend": None,
        "norm": "rms",
        "norm_weight": x[0],
        "norm_bias": None,
        "eps": 1e-5,
        "threshold": threshold,
        "decomposition": decomposition,
        "weights": weights,
        "w_scales": w_scales,
        "biases": biases,
    }
    with pytest.raises(ValueError, match=message):
        normed_linears(**whole | given)


def test_groups_that_are_too_large_or_half_with_a_bias():
    x, threshold, decomposition, weights, w_scales, _ = operands()
    with pytest.raises(ValueError, match=r"1 to 3 linears, .* given 4 weights and 0 biases"):
        int8_linears_gpu(x, threshold, decomposition, weights * 4, w_scales * 4, [])
    with pytest.raises(ValueError, match="given 2 weights and 1 biases"):
        int8_linears_gpu(x, threshold, decomposition, weights * 2, w_scales * 2, [torch.zeros(8)])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"w_device": "meta"}, ValueError, "x is on cpu, and the weight on meta"),
        ({"x_dtype": torch.float64}, TypeError, "x is torch.float64; allowed: torch.float32"),
        ({"w_dtype": torch.float16}, ValueError, r"torch.float16 \[4, 8, 16\].*int8 \[E, N, 16\]"),
        ({"K": 32}, ValueError, r"torch.int8 \[4, 8, 32\].*int8 \[E, N, 16\]"),
        ({"experts": None}, ValueError, "either their experts or, sorted, the ends"),
    ],
    ids=["device", "input dtype", "weight dtype", "width", "no routing"],
)
def test_experts_that_do_not_go_together_with_their_input(given, error, message):
    given = {"x_dtype": torch.float16, "w_dtype": torch.int8, "w_device": "cpu", "K": 16} | given
    x = torch.zeros(3, 16, dtype=given["x_dtype"])
    weight = torch.zeros(4, 8, given["K"], dtype=given["w_dtype"], device=given["w_device"])
    experts = given.get("experts", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(error, match=message):
        expert_linear(x, 6.0, "column", weight, torch.ones(4, 8), experts)


def test_an_input_on_another_device_than_the_weight_is_an_error_and_the_model_as_it_was():
    """Dynamo says it, as for a model in float: fake tensors know their devices."""
    model = torch.nn.Linear(16, 8).requires_grad_(False)
    with pytest.raises(Exception, match="meta"):
        compile_once(model, torch.zeros(3, 16, device="meta"))
    y, report = compile_once(model, torch.zeros(3, 16))
    assert y.shape == (3, 8)
    assert len(report.accepted) == 1


def test_operands_in_a_tuple_are_refused():
    """Inductor would drop the launch, and the result would be memory that was never written."""
    x = torch.ones(4, 8)
    with pytest.raises(TypeError, match=r"norm_kernel.* is a tuple"):
        run(norm_kernel, (4,), (x, x), 4, 8)
