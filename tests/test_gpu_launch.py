"""How kernels are launched on a GPU: where, with what, and how often a choice is made anew."""

import importlib
import inspect
import itertools
import pkgutil
import types
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import triton

from int8fx.kernels import gpu
from int8fx.kernels.gpu import configs, decode, launch, linear, tuning
from int8fx.kernels.gpu.experts import expert_linear
from int8fx.kernels.gpu.gemm import gemm_kernel


def triton_functions() -> dict[str, Any]:
    modules = [
        importlib.import_module(f"int8fx.kernels.gpu.{module.name}")
        for module in pkgutil.iter_modules(gpu.__path__)
    ]
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if isinstance(function, triton.JITFunction)
    }


def string_defaults(function: Any) -> list[str]:
    parameters = inspect.signature(function.fn).parameters.values()
    return [each.name for each in parameters if isinstance(each.default, str)]


def test_no_string_is_left_to_a_callees_default():
    """Triton 3.6 cannot compile a call that leaves one: torch then takes every input for written to."""
    functions = triton_functions()
    assert len(functions) > 30
    assert {name: found for name, each in functions.items() if (found := string_defaults(each))} == {}


@triton.jit
def defaulted(x, NORM: triton.language.constexpr = "rms"):
    return x


def test_the_check_notices_a_default():
    assert string_defaults(defaulted) == ["NORM"]


class Recorder:
    """Stands for ``wrap_triton``: every launch with its arguments, and the device that was current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, arch: str = "sm_90") -> None:
        self.launches: list[tuple[str, dict[str, Any], Any]] = []
        self.current: Any = None
        monkeypatch.setattr(launch, "wrap_triton", self)
        monkeypatch.setattr(configs, "architecture", lambda device: arch)
        monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        unmeasured = types.SimpleNamespace(name="a GPU without a table of tiles")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: unmeasured)

    def __call__(self, kernel: Any) -> Any:
        def run(*args: Any, **constants: Any) -> None:
            self.launches.append((kernel.fn.__name__, constants, self.current))

        return _Grids(run)

    def on(self, device: Any) -> Any:
        recorder = self

        class Current:
            def __enter__(self) -> None:
                recorder.current = device

            def __exit__(self, *raised: Any) -> None:
                recorder.current = None

        return Current()


class _Grids:
    def __init__(self, run: Any) -> None:
        self._run = run

    def __getitem__(self, grid: Any) -> Any:
        return self._run


def linears(N: int, K: int, device: str = "cpu") -> linear.Linears:
    weight = torch.zeros(N, K, dtype=torch.int8, device=device)
    return linear.Linears([weight], [torch.ones(N, device=device)], [])


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "sm_90"])
@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("M", [1, 8, 64])
def test_programs_count_themselves_where_the_count_comes_after_all_stores(
    monkeypatch, arch, decomposition, M
):
    """On gfx9 a part's stores may be on their way when the count says that they are there."""
    recorder = Recorder(monkeypatch, arch)
    x = torch.zeros(M, 8192, dtype=torch.float16)
    (y,) = linear.quantized(x, 6.0, decomposition, linears(64, 8192), sums=True)
    assert y.shape == (M, 64) and y.dtype == torch.float16
    name, constants, _ = recorder.launches[-1]
    assert name == ("decode_kernel" if M <= decode.MAX_M else "gemm_kernel")
    counts = constants["SPLIT_K"] > 1 and constants.get("SUMS", True)
    assert counts == (arch == "sm_90")


def test_no_shape_splits_a_product_on_gfx9():
    for arch, M, N, K in itertools.product(
        ("gfx90a", "gfx942"), (17, 64, 256, 2048), (3, 64, 4096), (512, 8192, 65536)
    ):
        chosen = configs.gemm_configs(arch, M, N, K, torch.float16, 304)
        assert {config.parts for config in chosen} == {1}


@pytest.mark.parametrize("M", [1, 8, 64])
def test_a_launch_is_on_the_device_of_x(monkeypatch, M):
    """Not on the current one: in a process with several GPUs that may be another."""
    recorder = Recorder(monkeypatch)
    with FakeTensorMode():
        x = torch.empty(M, 512, dtype=torch.float16, device="cuda:1")
        operands = linears(64, 512, "cuda:1")
        linear.quantized(x, 6.0, "column", operands, sums=True)
        weight = torch.empty(4, 64, 512, dtype=torch.int8, device="cuda:1")
        scale, ends = (
            torch.empty(4, 64, device="cuda:1"),
            torch.empty(4, dtype=torch.int32, device="cuda:1"),
        )
        expert_linear(x, 6.0, "column", weight, scale, None, ends)
    assert len(recorder.launches) >= 3
    assert {device for _, _, device in recorder.launches} == {torch.device("cuda", 1)}


def test_a_choice_is_made_anew_for_other_sizes_and_not_for_each_number_of_rows(monkeypatch):
    keys = []
    monkeypatch.setattr(
        triton, "autotune", lambda tried, key: keys.append(key) or (lambda kernel: kernel)
    )
    Recorder(monkeypatch)
    candidates = configs.gemm_configs("sm_90", 40, 4096, 1234, torch.float16, 132)
    assert len(candidates) > 1
    with tuning.tuning(True):
        launch.launch(gemm_kernel, candidates, 1234, lambda meta: (1,), torch.zeros(1))
    assert keys == [["N0", "N1", "N2", "K"]]


def test_max_autotune_tries_two_small_blocks_a_processor_against_a_big_one():
    """One leaves the tensor cores idle between steps of K, and two read operands more often."""
    tried = configs.gemm_configs("sm_90", 4096, 4096, 4096, torch.float16, 132)
    blocks = [(each.block_m + each.extra_m, each.block_n, each.blocks) for each in tried]
    assert blocks == [(128, 128, 2), (128, 256, 1), (192, 256, 1)]
