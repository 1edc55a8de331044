"""LoRA on an int8 model, with the real peft: training, saving, merging."""

import copy

import pytest
import torch
from support import Mlp
from torch import nn

import int8fx
from int8fx import Int8Weight

peft = pytest.importorskip("peft")

K, N = 32, 48


@pytest.fixture
def base():
    torch.manual_seed(0)
    return int8fx.quantize_(Mlp(K, N))


@pytest.fixture
def x():
    return torch.randn(6, K, generator=torch.Generator().manual_seed(1))


def adapted(base):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(base, config)


def base_weight(model):
    return model.base_model.model.up.base_layer.weight


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_dequantised_model_in_float64(base, x, compiled):
    model = adapted(base)
    reference = copy.deepcopy(model)
    int8fx.dequantize_(reference).double()
    call = model
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, backend="llmint8", fullgraph=True)
    call(x).pow(2).sum().backward()
    reference(x.double()).pow(2).sum().backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if "lora" in n}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 4
    for name, gradient in found.items():
        # The activations' rounding to int8 is all that differs.
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, f"{name}: {error:.4f}"


def test_training_lowers_the_loss_and_leaves_the_base_int8(base, x):
    model = adapted(base)
    weight = base_weight(model).clone()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert type(base_weight(model)) is Int8Weight and torch.equal(base_weight(model), weight)


def test_save_and_load(base, x, tmp_path):
    model = adapted(copy.deepcopy(base)).eval()
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(read(x), model(x))
    assert type(base_weight(read)) is Int8Weight


def test_merge_and_unmerge(base, x):
    model = adapted(base).eval()
    with torch.no_grad():
        apart = model(x)
        delta = model.base_model.model.up.get_delta_weight("default")
        expected = base_weight(model).dequantize() + delta
        model.merge_adapter()
        weight = base_weight(model)
        assert type(weight) is Int8Weight
        step = weight.w_scale.unsqueeze(1)
        assert ((weight.dequantize() - expected).abs() <= 0.5001 * step).all()
        assert (model(x) - apart).norm() < 0.02 * apart.norm()
        before = base.up.base_layer.weight.dequantize() - delta
        model.unmerge_adapter()
        unmerged = base_weight(model)
        assert type(unmerged) is Int8Weight
        step = unmerged.w_scale.unsqueeze(1)
        assert ((unmerged.dequantize() - before).abs() <= 0.5001 * step).all()


def test_merge_and_unload(base, x):
    model = adapted(base).eval()
    apart = model(x)
    merged = model.merge_and_unload()
    assert type(merged.up) is nn.Linear and type(merged.up.weight) is Int8Weight
    assert (merged(x) - apart).norm() < 0.02 * apart.norm()
