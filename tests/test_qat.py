"""Quantisation-aware training: the forward pass, its gradients, what converts, and misuse."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.kernels.schemes.straight_through import straight_through_linear
from int8fx.kernels.schemes.text import as_text
from int8fx.testing.bounds import FP32
from int8fx.testing.support import Mlp, reports_of

K, N = 64, 96
# What differs from the defaults, where a scheme has settings.
SETTINGS = {
    "llm.int8": {"threshold": 3.0, "decomposition": "token"},
    "llm.int8-zeropoint": {"threshold": 3.0},
    "int8-rotated": {"block": 32, "columns": (3, 7)},
    "w8a16-group": {"group_size": 32},
    "w4a16-group": {"group_size": 16, "zeros": "offset", "act_order": True},
    "w4a8-group": {"group_size": 16, "block": 32, "columns": (7,)},
    "wna16-group": {"group_size": 32, "bits": 3},
    "nf4": {"blocksize": 32},
}
each_scheme = pytest.mark.parametrize("name", int8fx.SCHEMES)


def options_of(name):
    """Of a model whose linears all have K columns."""
    return {"scheme": name, **SETTINGS.get(name, {})}


def model_of(seed=0):
    torch.manual_seed(seed)
    return Mlp(K, N)


def prepared(name):
    return int8fx.prepare_qat_(model_of(), **options_of(name))


def batch(*shape, seed=1):
    x = torch.randn(*(shape or (5,)), K, generator=torch.Generator().manual_seed(seed))
    x[..., 7] *= 9
    return x


def trained(model, steps=3, rate=1e-2):
    """After a few steps, so that no weight is what it was; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = batch(32, seed=10 + step)
        loss = (model(x) - x.roll(1, -1)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- forward --------------------------------------------------------------------------------------


@each_scheme
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_the_forward_is_that_of_the_quantised_model_bit_for_bit(name, shape):
    model, x = prepared(name), batch(*shape) if shape != () else batch(1)[0]
    expected = int8fx.quantize_(model_of(), **options_of(name))(x)
    y = model(x)
    assert y.shape == expected.shape and torch.equal(y, expected)


@each_scheme
def test_the_forward_is_the_schemes_formula_within_round_off(name):
    """Independent of the quantised model: x̂ @ ŵᵀ + bias in float64.

    A kernel's terms are codes times steps, and offsets of their size: of a group of 16 weights each is
    at most 2 max |w|, and so their sum with |x| at most 4 √16 |w| |x| in the 2-norm, which a rotation
    leaves as it is. There are at most 2 K + 8 roundings of it.
    """
    linear, x = nn.Linear(K, N), batch()
    scheme = int8fx.SCHEMES[name]
    settings = scheme.choice(**SETTINGS.get(name, {})).settings
    expected = scheme.reference(x, linear.weight.detach(), linear.bias.detach(), settings)
    y = int8fx.prepare_qat_(linear, **options_of(name))(x)
    norms = x.double().norm(dim=-1, keepdim=True) * linear.weight.double().norm(dim=1)
    assert ((y.double() - expected).abs() <= FP32 * (2 * K + 8) * (16 * norms + expected.abs())).all()
    assert not torch.allclose(y, F.linear(x, linear.weight, linear.bias), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llm.int8", "w4a8-group", "nf4"])
def test_other_dtypes(name, dtype):
    model = model_of() if dtype == torch.float64 else model_of().to(dtype)
    x = batch().to(dtype)
    expected = int8fx.quantize_(copy.deepcopy(model), **options_of(name))
    int8fx.prepare_qat_(model, **options_of(name))
    y = model.up(x)
    assert y.dtype == dtype
    if dtype == torch.float64:  # a product of values, by a library
        torch.testing.assert_close(y, expected.up(x), rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(y, expected.up(x))


@pytest.mark.parametrize("name", ["llm.int8", "w4a8-group", "w4a16-group", "nf4"])
def test_under_autocast(name):
    model, x = prepared(name), batch()
    expected = int8fx.quantize_(model_of(), **options_of(name))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, expected(x))
    y.float().sum().backward()
    assert model.up.weight.grad.dtype == torch.float32


# --- gradients ------------------------------------------------------------------------------------


@each_scheme
def test_gradients_are_straight_through(name):
    """Those of x̂ @ ŵᵀ + bias with respect to x̂ and ŵ, in float64."""
    linear, x = nn.Linear(K, N), batch(2, 3).requires_grad_()
    choice = int8fx.SCHEMES[name].choice(**SETTINGS.get(name, {}))
    kept, weight = choice.weight_format, linear.weight.detach()
    w_hat = kept.dequantize(kept.quantize(weight), N, K).double().requires_grad_()
    rows = x.detach().reshape(-1, K)
    x_hat = choice.scheme.dequantized_input(rows, choice.settings).double().requires_grad_()
    grad = torch.randn(6, N, generator=torch.Generator().manual_seed(2))
    (x_hat @ w_hat.t()).backward(grad.double())

    int8fx.prepare_qat_(linear, **options_of(name))(x).backward(grad.view(2, 3, N))
    found = {"x": x.grad.reshape(-1, K), "weight": linear.weight.grad, "bias": linear.bias.grad}
    expected = {"x": x_hat.grad, "weight": w_hat.grad, "bias": grad.double().sum(0)}
    for each, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[each], rtol=1e-5, atol=1e-4)
    # A gradient with respect to what was rounded would be zero, or that of the float product.
    assert not torch.allclose(found["x"].double(), grad.double() @ weight.double(), rtol=1e-5)


@pytest.mark.parametrize("name", ["llm.int8", "w4a8-group", "nf4"])
def test_opcheck(name):
    linear, x = nn.Linear(K, N), batch().requires_grad_()
    how = as_text(int8fx.SCHEMES[name].choice(**SETTINGS.get(name, {})))
    torch.library.opcheck(straight_through_linear, (x, linear.weight, linear.bias, *how))


def test_what_takes_no_gradient_gets_none():
    linear, x = nn.Linear(K, N, bias=False), batch()
    int8fx.prepare_qat_(linear)(x).sum().backward()
    assert x.grad is None and linear.weight.grad.abs().sum() > 0
    linear.weight.requires_grad_(False)
    y = linear(x.requires_grad_()).sum()
    y.backward()
    assert x.grad is not None


@pytest.mark.parametrize("backend", ["inductor", "llmint8"])
@pytest.mark.parametrize("name", ["llm.int8", "w4a8-group", "nf4"])
def test_compiled_in_one_graph_it_takes_the_same_steps(name, backend):
    eager, model, x = prepared(name), prepared(name), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for each, call in ((eager, eager), (model, compiled)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            call(x).pow(2).mean().backward()
            optimizer.step()
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", ["llm.int8", "w4a8-group", "w4a16-group", "nf4"])
def test_the_loss_falls_and_the_quantised_model_keeps_it(name):
    model = prepared(name)
    losses = trained(model, 60)
    assert losses[-1] < 0.6 * losses[0]
    x = batch(32, seed=500)
    after = model(x)
    assert torch.equal(int8fx.convert_qat_(model)(x), after)


def test_training_helps_more_than_quantising_afterwards():
    """At 2 bits rounding decides: the same steps through it bring the model nearer to the target."""
    options = {"scheme": "wna16-group", "bits": 2, "group_size": 64}
    floats = model_of()
    trained(floats, 150)
    aware = int8fx.prepare_qat_(copy.deepcopy(floats), **options)
    for model in (floats, aware):
        trained(model, 150, rate=1e-3)
    x = batch(64, seed=900)

    def error(model):
        return (model(x) - x.roll(1, -1)).pow(2).mean().item()

    assert error(int8fx.convert_qat_(aware)) < error(int8fx.quantize_(floats, **options))


# --- conversion -----------------------------------------------------------------------------------


@each_scheme
def test_convert_is_quantize_of_the_trained_weights_bit_for_bit(name, tmp_path):
    model = prepared(name)
    trained(model)
    floats = model_of(seed=9)
    floats.load_state_dict(model.state_dict())  # float weights by the names that they had
    expected = int8fx.quantize_(floats, **options_of(name))
    assert int8fx.convert_qat_(model) is model
    assert type(model.up) is nn.Linear and type(model.up.weight) is Int8Weight
    assert repr(model) == repr(expected) and vars(model.up).keys() == vars(expected.up).keys()
    mine, other = model.state_dict(), expected.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    for folder, each in (("mine", model), ("other", expected)):
        int8fx.save_checkpoint(each, tmp_path / folder)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("mine", "other")
    ]
    assert files[0] == files[1]


def test_rules_skip_and_calibration_are_those_of_quantize():
    calibration = int8fx.calibrate(model_of(), [batch(32)])
    options = {
        "scheme": "w4a8-group",
        "calibration": calibration,
        "columns": 4,
        "rules": [("down", "nf4")],
    }
    model = int8fx.prepare_qat_(model_of(), **options)
    assert len(json.loads(model.up.qat_settings)["columns"]) == 4 and model.down.qat_scheme == "nf4"
    trained(model)
    floats = model_of(seed=9)
    floats.load_state_dict(model.state_dict())
    expected = int8fx.quantize_(floats, **options)
    int8fx.convert_qat_(model)
    for mine, other in ((model.up, expected.up), (model.down, expected.down)):
        assert torch.equal(mine.weight, other.weight) and mine.weight.options == other.weight.options
    skipped = int8fx.prepare_qat_(model_of(), skip=["down"])
    assert type(skipped.down) is nn.Linear and type(skipped.up) is not nn.Linear


def test_a_shared_weight_is_one_weight_afterwards():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    int8fx.prepare_qat_(model, rules=[("0", "nf4"), ("1", "w8a16")])
    model(batch()).sum().backward()
    int8fx.convert_qat_(model)
    assert model[0].weight is model[1].weight and model[0].weight.choice.scheme.name == "nf4"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_go_on(copied):
    model, x = prepared("w4a8-group"), batch()
    twin = copied(model)
    assert torch.equal(twin(x), model(x)) and repr(twin) == repr(model)
    assert twin.up.weight is not model.up.weight
    expected = int8fx.quantize_(model_of(), **options_of("w4a8-group"))
    assert torch.equal(int8fx.convert_qat_(twin).up.weight, expected.up.weight)
    assert type(model.up) is not nn.Linear  # the other one is converted


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(N, K)), batch(2, 3)
    expected = int8fx.quantize_(copy.deepcopy(model), scheme="w4a16-group")
    int8fx.prepare_qat_(model, scheme="w4a16-group")
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, expected(x)) and model[0].weight.grad.shape == (K, N)
    assert torch.equal(int8fx.convert_qat_(model)[0].weight, expected[0].weight)


def test_a_model_of_transformers_trains_converts_and_is_saved(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    int8fx.prepare_qat_(model, scheme="w4a16-group")
    tokens = torch.arange(8).view(1, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        int8fx.convert_qat_(model).save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(tokens).logits, expected)


# --- what others say of it ------------------------------------------------------------------------


def test_llmint8_leaves_it_and_says_why():
    model = prepared("w4a8-group").requires_grad_(False)
    (report,) = reports_of(lambda: torch.compile(model, backend="llmint8", fullgraph=True)(batch()))
    reason = (
        "its weight is trained in w4a8-group (QAT) and quantised at each call; int8fx.convert_qat_ "
        "quantises it for good"
    )
    assert {each.path: each.reason for each in report.decisions} == {"up": reason, "down": reason}
    assert reason in " ".join(str(int8fx.explain(model, batch())).split())


def test_quantize_refuses_what_is_prepared():
    model = prepared("nf4")
    reason = "its weight is trained (QAT): int8fx.convert_qat_ quantises it"
    assert [each.reason for each in int8fx.decisions(model)] == [reason, reason]
    with pytest.raises(ValueError, match="convert_qat_ quantises it"):
        int8fx.quantize_(model)


# --- misuse ---------------------------------------------------------------------------------------


def state(model):
    kinds = [(path, type(module), set(vars(module))) for path, module in model.named_modules()]
    return kinds, [parameter.clone() for parameter in model.parameters()]


def assert_as_it_was(model, before):
    kinds, parameters = state(model)
    assert kinds == before[0] and all(map(torch.equal, parameters, before[1]))


MISUSE = {
    "an unknown scheme": ({"scheme": "w5"}, "'w5'"),
    "an unknown option": ({"method": "gptq"}, "unknown option 'method' for prepare_qat_"),
    "a setting of another scheme": ({"scheme": "nf4", "threshold": 3.0}, "threshold"),
    "nothing to train": ({"skip": ["*"]}, "found no weight to train in Mlp"),
}


@pytest.mark.parametrize(("options", "message"), MISUSE.values(), ids=MISUSE)
def test_a_wrong_preparation_leaves_the_model(options, message):
    model = model_of()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        int8fx.prepare_qat_(model, **options)
    assert_as_it_was(model, before)


def test_preparing_twice_is_an_error():
    model = prepared("nf4")
    before = state(model)
    with pytest.raises(ValueError, match=r"up of Mlp is prepared already; int8fx\.convert_qat_"):
        int8fx.prepare_qat_(model, scheme="w8a16")
    assert_as_it_was(model, before)


def test_converting_what_was_not_prepared_is_an_error():
    model = model_of()
    before = state(model)
    with pytest.raises(ValueError, match=r"Mlp was not prepared; int8fx\.prepare_qat_"):
        int8fx.convert_qat_(model)
    assert_as_it_was(model, before)
    inner = prepared("nf4")
    with pytest.raises(ValueError, match="Sequential was not prepared, but its module '1' was"):
        int8fx.convert_qat_(nn.Sequential(nn.ReLU(), inner))
    with pytest.raises(ValueError, match="QatLinear is a part of what prepare_qat_ was given"):
        int8fx.convert_qat_(inner.up)
    int8fx.convert_qat_(inner)
    with pytest.raises(ValueError, match="Mlp was not prepared"):
        int8fx.convert_qat_(inner)


def test_converting_what_something_was_made_of_is_an_error():
    model = prepared("nf4")
    nn.utils.parametrize.register_parametrization(model.up, "weight", nn.Identity())
    before = state(model)
    with pytest.raises(ValueError, match="up has the class ParametrizedQatLinear"):
        int8fx.convert_qat_(model)
    assert_as_it_was(model, before)


def test_a_conversion_that_fails_leaves_the_model_prepared():
    model, x = prepared("nf4"), batch()
    shared = nn.Parameter(model.up.weight.detach().clone())
    model.register_parameter("also", shared)
    with torch.no_grad():
        shared.set_(model.up.weight)  # now it shares memory with what stays in float
    del model.down
    model.down = nn.ReLU()
    before, y = state(model), model(x)
    with pytest.raises(ValueError, match="shares memory with also"):
        int8fx.convert_qat_(model)
    assert_as_it_was(model, before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", ["prepare_qat_", "convert_qat_"])
def test_what_is_no_module_is_named(name):
    with pytest.raises(TypeError, match=f"^{name}: given str; allowed"):
        getattr(int8fx, name)("model")
