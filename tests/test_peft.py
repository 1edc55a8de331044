"""LoRA on an int8 model, with the real peft: training, saving, merging."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.testing.support import Mlp, check_adapter_gradients, compile_once
from int8fx.torch_private import compile_counts

peft = pytest.importorskip("peft")

K, N = 32, 48


@pytest.fixture
def base():
    torch.manual_seed(0)
    return int8fx.quantize_(Mlp(K, N))


@pytest.fixture
def x():
    return torch.randn(6, K, generator=torch.Generator().manual_seed(1))


# The activations' rounding to int8 is all that differs.
GRADIENT_BOUND = 0.02


def adapted(base):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(base, config)


def base_weight(model):
    return model.base_model.model.up.base_layer.weight


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_dequantised_model_in_float64(base, x, compiled):
    check_adapter_gradients(adapted(base), x, compiled, GRADIENT_BOUND)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "w4a16-group", "w4a8-group", "wna16-group"])
def test_gradients_through_weights_of_four_bits(x, scheme, compiled):
    """QLoRA: forward and backward in one graph, and the base stays what it is."""
    torch.manual_seed(0)
    base = int8fx.quantize_(Mlp(K, N), scheme=scheme)
    model = adapted(base)
    before = [tensor.clone() for tensor in base_weight(model).tensors]
    check_adapter_gradients(model, x, compiled, GRADIENT_BOUND)
    assert all(map(torch.equal, base_weight(model).tensors, before))


@pytest.mark.parametrize("scheme", ["nf4", "w4a16-group", "w4a8-group"])
@torch.no_grad()
def test_an_adapter_is_merged_into_four_bits_and_taken_back(x, exact, scheme):
    torch.manual_seed(0)
    model = adapted(int8fx.quantize_(Mlp(K, N), scheme=scheme)).eval()
    before, alone = model(x), model.base_model.model.up.base_layer.weight.dequantize()
    model.merge_adapter()
    assert type(base_weight(model)) is Int8Weight
    assert not torch.equal(base_weight(model).dequantize(), alone)
    # The sum is quantised anew.
    assert (model(x) - before).norm() < 0.2 * before.norm()
    model.unmerge_adapter()
    assert torch.equal(base_weight(model).dequantize(), alone)


@torch.no_grad()
def test_a_merge_into_four_bits_says_that_it_rounds_again(base):
    four = adapted(int8fx.quantize_(Mlp(K, N), scheme="nf4"))
    with pytest.warns(UserWarning, match="a 4-bit weight, .* merged, is quantised again") as caught:
        four.merge_adapter()
    assert "import int8fx.integrations.peft" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        four.unmerge_adapter()
        adapted(base).merge_adapter()  # in 8 bits it loses next to nothing


def states_of(model):
    """Every state that adapters can be in, by what brings a model there."""

    def switch(name):
        return lambda: model.set_adapter(name)

    return {
        "first": switch("default"),
        "second": switch("second"),
        "off": lambda: model.base_model.disable_adapter_layers(),
        "on": lambda: model.base_model.enable_adapter_layers(),
        "merged": lambda: model.merge_adapter(),
        "apart": lambda: model.unmerge_adapter(),
    }


@pytest.mark.parametrize("scheme", ["nf4", "w4a16-group", "llm.int8"])
@torch.no_grad()
def test_adapters_are_switched_and_merged_without_a_compile_each_time(x, exact, scheme):
    torch.manual_seed(0)
    model = adapted(int8fx.quantize_(Mlp(K, N), scheme=scheme)).eval()
    torch.manual_seed(2)
    model.add_adapter("second", model.peft_config["default"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8")
    counts = []
    for _ in range(3):
        before, _ = compile_counts()
        for name, bring in states_of(model).items():
            bring()
            y = compiled(x)
            expected = model(x)
            assert (y - expected).norm() < 1e-4 * expected.norm(), name
        counts.append(compile_counts()[0] - before)
    assert 1 <= counts[0] <= 4 and counts[1:] == [0, 0]


def test_prepare_model_for_kbit_training():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model = int8fx.quantize_(model.bfloat16(), scheme="nf4")
    weight = model.model.layers[0].mlp.up_proj.weight
    parts, packed = [tensor.clone() for tensor in weight.tensors], weight.int8_bytes
    model = peft.prepare_model_for_kbit_training(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight) is Int8Weight and weight.int8_bytes == packed
    assert all(map(torch.equal, weight.tensors, parts))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    tokens, losses = torch.arange(16).view(1, 16) * 7 % 128, []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert all(map(torch.equal, base.tensors, parts))


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


@pytest.fixture
def exact(monkeypatch):
    """As after ``import int8fx.integrations.peft``, for one test."""
    layer = peft.tuners.lora.layer.Linear
    for name in ("merge", "unmerge"):
        monkeypatch.setattr(layer, name, getattr(layer, name))
    sys.modules.pop("int8fx.integrations.peft", None)
    importlib.import_module("int8fx.integrations.peft")


def test_a_merge_that_is_refused_leaves_the_way_back(base, exact):
    model = adapted(base).eval()
    torch.manual_seed(2)
    model.add_adapter("bad", model.peft_config["default"])
    for parameter in model.base_model.model.up.lora_B["bad"].parameters():
        parameter.data.fill_(float("nan"))
    before = base_weight(model).clone()
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(["bad"], safe_merge=True)
    model.unmerge_adapter()
    assert torch.equal(base_weight(model), before)


@pytest.mark.parametrize("safe", [False, True])
def test_unmerging_restores_the_base_bit_for_bit(base, x, exact, safe):
    model = adapted(base).eval()
    torch.manual_seed(2)
    model.add_adapter("second", model.peft_config["default"])
    before, bias, apart = base_weight(model).clone(), base.up.base_layer.bias.clone(), model(x)
    for _ in range(2):
        model.merge_adapter(["default"], safe_merge=safe)
        once = base_weight(model).clone()
        assert not torch.equal(once, before)
        model.merge_adapter(["second"], safe_merge=safe)
        assert not torch.equal(base_weight(model), once)
        model.unmerge_adapter()
        assert type(base_weight(model)) is Int8Weight and torch.equal(base_weight(model), before)
        assert torch.equal(base.up.base_layer.bias, bias)
    assert torch.equal(model(x), apart)


def test_a_merged_weight_that_was_changed_is_not_put_back(base, exact):
    model = adapted(base).eval()
    layer = model.base_model.model.up
    before = base_weight(model).clone()
    model.merge_adapter()
    other = torch.randn(N, K)
    with torch.no_grad():
        base_weight(model).copy_(other)
        expected = base_weight(model).dequantize() - layer.get_delta_weight("default")
        model.unmerge_adapter()
    step = base_weight(model).w_scale.unsqueeze(1)
    assert ((base_weight(model).dequantize() - expected).abs() <= 0.5001 * step).all()
    assert not torch.equal(base_weight(model), before)


def test_what_an_unloaded_layer_kept_is_gone(base, exact):
    merged = adapted(base).eval().merge_and_unload()
    assert type(merged.up) is nn.Linear
    assert set(vars(merged.up)) == set(vars(int8fx.quantize_(nn.Sequential(nn.Linear(64, 64)))[0]))


def test_merged_then_saved_and_compiled(base, x, tmp_path):
    merged = adapted(copy.deepcopy(base)).eval().merge_and_unload().requires_grad_(False)
    y, report = compile_once(merged, x)
    assert torch.equal(y, merged(x)) and [d.path for d in report.accepted] == ["up", "down"]
    int8fx.save_checkpoint(merged, tmp_path)
    read = int8fx.load_checkpoint(base, tmp_path)
    assert torch.equal(read(x), y)


def test_merged_and_unmerged_a_compiled_model_sees_it(base, x, exact):
    model = adapted(base).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8")
    with torch.no_grad():
        apart = compiled(x)
        model.merge_adapter()
        assert torch.equal(compiled(x), model(x))
        model.unmerge_adapter()
        assert torch.equal(compiled(x), apart)


def test_merge_and_unload(base, x):
    model = adapted(base).eval()
    apart = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.up) is nn.Linear and type(merged.up.weight) is Int8Weight
    assert (merged(x) - apart).norm() < 0.02 * apart.norm()
