"""Rotated weights in 1, 2 and 4 gloo processes: results are the same bits, whatever their number."""

import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import int8fx
from int8fx.testing.support import Mlp

K, N = 96, 256  # four parts of down's columns are whole blocks of 64
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
ROTATED = {"scheme": "int8-rotated", "only": ["*"]}
DTYPES = (torch.float32, torch.bfloat16)


class Biased(Mlp):
    """With a bias in the linear whose columns are divided, too."""

    def __init__(self) -> None:
        super().__init__(K, N)
        self.down = nn.Linear(N, K)


def built(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Biased().requires_grad_(False).to(dtype)


def batch(dtype: torch.dtype) -> torch.Tensor:
    """With a column that is large in every row: each process has another largest element."""
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1))
    x[..., 7] *= 40.0
    return x.to(dtype)


def results(mesh) -> dict[str, torch.Tensor]:
    """By what was computed."""
    found = {}
    for dtype in DTYPES:
        name, x = str(dtype), batch(dtype)
        model = int8fx.quantize_(parallelize_module(built(dtype), mesh, PLAN), **ROTATED)
        found[f"{name} eager"] = model(x)
        found[f"{name} rows"] = model(x[0])
        part = model.down.weight.to_local()
        found[f"{name} scales"] = part.w_scale.clone()
        assert part.columns_among
        if dtype == torch.float32:
            torch._dynamo.reset()
            found[f"{name} compiled"] = torch.compile(model, backend="llmint8")(x)
        broken = x.clone()
        broken[1, 2, 7] = float("nan")
        y = model(broken)
        assert not y[1, 2].isfinite().any()
        found[f"{name} beside a nan"] = y.index_fill(1, torch.tensor([2]), 0.0)
    uneven = {**ROTATED, "block": 256}  # 256 columns are one block, which no part has
    model = int8fx.quantize_(parallelize_module(built(torch.float32), mesh, PLAN), **uneven)
    if mesh.size() > 1:
        assert not model.down.weight.to_local().columns_among
    y, exact = model(batch(torch.float32)), built(torch.float32)(batch(torch.float32))
    assert (y - exact).norm() < 0.02 * exact.norm()
    # Its own scales again, once one process has written to its part.
    written = int8fx.quantize_(parallelize_module(built(torch.float32), mesh, PLAN), **ROTATED)
    expected = written(batch(torch.float32))
    written.down.weight.to_local().copy_(written.down.weight.to_local().dequantize() * 2)
    assert not written.down.weight.to_local().columns_among
    twice = written(batch(torch.float32)) - written.down.bias.full_tensor()
    expected = 2 * (expected - written.down.bias.full_tensor())
    assert (twice - expected).norm() < 0.02 * expected.norm()
    return found


def _run(rank: int, processes: int, path: str, outcomes) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    where = {"init_method": f"file://{path}", "rank": rank, "world_size": processes}
    dist.init_process_group("gloo", **where, timeout=timedelta(minutes=10))
    try:
        found = results(init_device_mesh("cpu", (processes,)))
        outcomes.put((rank, {name: y.float().numpy() for name, y in found.items()}, ""))
    except BaseException:
        outcomes.put((rank, {}, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


def over(processes: int, folder) -> list[dict]:
    context = multiprocessing.get_context("spawn")
    outcomes = context.Queue()
    path = str(folder / f"rendezvous-{processes}")
    started = [
        context.Process(target=_run, args=(rank, processes, path, outcomes))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    found = {rank: (y, error) for rank, y, error in (outcomes.get() for _ in started)}
    for process in started:
        process.join(60)
    for rank in range(processes):
        assert not found[rank][1], found[rank][1]
    return [found[rank][0] for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    (found,) = over(1, tmp_path_factory.mktemp("alone"))
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_results_are_the_same_bits_in_any_number_of_processes(processes, alone, tmp_path):
    for found in over(processes, tmp_path):
        assert found.keys() == alone.keys()
        for name, y in found.items():
            assert (y == alone[name]).all(), name


def test_one_process_has_what_an_undivided_model_has(alone):
    """But for the last bit of fp32, where the kernel adds a bias in one step with a product."""
    for dtype in DTYPES:
        model = int8fx.quantize_(built(dtype), **ROTATED)
        y, other = model(batch(dtype)).float(), torch.from_numpy(alone[f"{dtype} eager"])
        torch.testing.assert_close(y, other, rtol=1e-6, atol=1e-6)
        assert (model.down.weight.w_scale.numpy() == alone[f"{dtype} scales"]).all()
