"""Offloading with accelerate: int8 weights wait on the CPU or on disk, and come back whole."""

import pytest
import torch
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CheckpointError
from int8fx.testing.support import Mlp

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import (  # noqa: E402
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)

K, N = 32, 48


@pytest.fixture
def floats():
    torch.manual_seed(0)
    return Mlp(K, N).bfloat16().requires_grad_(False)


@pytest.fixture
def model(floats):
    return int8fx.quantize_(floats, threshold=3.0)


@pytest.fixture
def x():
    return 2 * torch.randn(5, K, generator=torch.Generator().manual_seed(1)).bfloat16()


def to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")


def dispatched(model, folder):
    accelerate.dispatch_model(model, {"up": "disk", "down": "cpu"}, offload_dir=folder)


def preloaded(model, folder):
    """A hook at the top holds what its modules do not call: ``up.weight`` and so on."""
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Mlp"])


def by_hook(model, folder):
    """A hook that made its own map, of the parameters themselves."""
    add_hook_to_module(model.up, AlignDevicesHook("cpu", offload=True))


ENTRANCES = [to_cpu, to_disk, dispatched, preloaded, by_hook]


@pytest.mark.parametrize("offload", ENTRANCES, ids=lambda offload: offload.__name__)
def test_an_offloaded_model_gives_what_it_gave_and_can_be_brought_back(model, x, tmp_path, offload):
    expected, before = model(x), {name: t.clone() for name, t in model.state_dict().items()}
    offload(model, tmp_path)
    for _ in range(2):
        assert type(model.up.weight) is Int8Weight and model.up.weight.is_meta
        assert torch.equal(model(x), expected)
    remove_hook_from_submodules(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert isinstance(model.up.weight, nn.Parameter) and model.up.weight.threshold == 3.0
    assert torch.equal(model(x), expected)


def test_a_conv1d_comes_back_in_its_own_shape(x):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = int8fx.quantize_(Conv1D(N, K).bfloat16().requires_grad_(False))
    expected = conv(x)
    accelerate.cpu_offload(conv, execution_device="cpu")
    assert torch.equal(conv(x), expected)


def test_weights_that_another_device_works_on_wait_on_the_cpu(model, x):
    """With "meta" in the place of a GPU."""
    hidden = torch.randn(5, N, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = model.down(hidden)
    accelerate.dispatch_model(model, {"up": "meta", "down": "cpu"}, main_device="meta")
    assert model(x.to("meta")).shape == (5, K) and model.down.weight.is_meta
    remove_hook_from_submodules(model.down)
    assert torch.equal(model.down(hidden), expected)


def test_a_tied_weight_is_told_from_the_others(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)).bfloat16()
    model[2].weight = model[0].weight
    int8fx.quantize_(model.requires_grad_(False))
    expected = model(x)
    accelerate.dispatch_model(model, {"0": "cpu", "1": "disk", "2": "cpu"}, offload_dir=tmp_path)
    assert model[2].weight is model[0].weight
    assert torch.equal(model(x), expected)


def test_what_is_damaged_on_disk_is_named(model, x, tmp_path):
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    file = tmp_path / "down.weight_scale.dat"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="weight: corrupt: a scale that is not finite, or not"):
        model(x)


def test_what_needs_the_values_of_an_offloaded_weight_says_so(model, x, tmp_path):
    accelerate.cpu_offload(model, execution_device="cpu")
    expected = model(x)
    with pytest.raises(ValueError, match=r"dequantize_: a weight .* is offloaded.*remove_hook_from"):
        int8fx.dequantize_(model)
    with pytest.raises(CheckpointError, match=r"up\.weight: on the meta device"):
        int8fx.save_checkpoint(model, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert torch.equal(model(x), expected)


def test_float_modules_are_offloaded_as_ever(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)).bfloat16()
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(x), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), expected)


def test_values_alone_make_no_int8_weight(model):
    with pytest.raises(TypeError, match=r"of a tensor of shape \[2, 3\] and torch.float32 alone"):
        Int8Weight(torch.ones(2, 3), requires_grad=False)
    again = type(model.up.weight)(model.up.weight, requires_grad=False)
    assert isinstance(again, nn.Parameter) and torch.equal(again, model.up.weight)
    with pytest.raises(RuntimeError, match="cannot require grad"):
        Int8Weight(model.up.weight, requires_grad=True)
