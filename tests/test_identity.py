"""Snapshots see whatever may have changed a tensor's values; both kinds see the same."""

import pytest
import torch
from torch import nn

from int8fx.identity import CompiledSnapshot, Snapshot, snapshot
from int8fx.kernels.cpu import int8_linear as cpu


@pytest.fixture(params=[Snapshot, CompiledSnapshot])
def kind(request):
    if request.param is CompiledSnapshot and (reason := cpu.load()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def tensors():
    return [nn.Parameter(torch.randn(3, 2)), torch.randn(4), torch.randn(0)]


def in_place(tensors):
    with torch.no_grad():
        tensors[0].mul_(2)


def through_a_view(tensors):
    tensors[1][:2].zero_()


def data(tensors):
    tensors[0].data = torch.randn(3, 2)


def data_there_and_back(tensors):
    tensors[1].data = tensors[1].data.double()
    tensors[1].data = tensors[1].data.float()


def another_tensor(tensors):
    tensors[1] = tensors[1].detach()


def another_order(tensors):
    tensors.reverse()


@pytest.mark.parametrize(
    "change",
    [in_place, through_a_view, data, data_there_and_back, another_tensor, another_order],
    ids=lambda change: change.__name__,
)
def test_a_change_is_seen(kind, tensors, change):
    before = kind(tensors)
    change(tensors)
    assert not before.matches(tensors)
    assert kind(tensors).matches(tensors)


def test_reading_is_no_change(kind, tensors):
    before = kind(tensors)
    tensors[1].sum()
    assert before.matches(tensors)
    assert before.matches(list(tensors))


def test_inference_tensors_have_no_version(kind):
    with torch.inference_mode():
        tensors = [torch.randn(2)]
        assert kind(tensors).matches(tensors)
        assert not kind(tensors).matches([torch.randn(2)])


def test_the_compiled_kind_serves_where_there_is_a_compiler(tensors):
    assert isinstance(snapshot(tensors), Snapshot if cpu.load() else CompiledSnapshot)
