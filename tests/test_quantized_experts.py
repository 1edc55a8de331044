"""Experts in fewer than 8 bits: quantised in place, by every spelling of a product, kept and moved."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.kernels.schemes.experts import EACH, scheme_expert_linear
from int8fx.kernels.schemes.text import as_text
from int8fx.testing.support import reports_of
from int8fx.testing.toy_models import build

E, N, K, S = 4, 24, 48, 9
SETTINGS = {
    "w4a16-group": {"group_size": 16},
    "w4a8-group": {"group_size": 16, "block": 16, "columns": (3,)},
    "wna16-group": {"group_size": 16, "bits": 3, "act_order": True, "zeros": "offset"},
    "nf4": {"blocksize": 16},
}
each_scheme = pytest.mark.parametrize("name", SETTINGS)
MIXED = [3, 0, 0, 1, 3, 0, 1, 3, 2]
SORTED = sorted(MIXED)
MODELS = ["mixtral", "qwen3_moe", "gpt_oss"]


class Experts(nn.Module):
    """As the experts of transformers keep their weights."""

    def __init__(self, is_transposed=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(E, N, K, generator=generator) * 0.2
        self.is_transposed = is_transposed
        self.up = nn.Parameter(weight.mT.contiguous() if is_transposed else weight)


def quantized(name, is_transposed=False):
    return int8fx.quantize_(Experts(is_transposed), scheme=name, **SETTINGS[name])


def rows():
    return torch.randn(S, K, generator=torch.Generator().manual_seed(1))


def one_by_one(name, x, experts):
    """The product of each row with a linear of its expert's matrix alone."""
    weight = Experts().up.detach()
    linears = [nn.Linear(K, N, bias=False) for _ in range(E)]
    for linear, matrix in zip(linears, weight, strict=True):
        linear.weight.data = matrix.clone()
        int8fx.quantize_(linear, scheme=name, **SETTINGS[name])
    return torch.stack([linears[e](row) for row, e in zip(x[: len(experts)], experts, strict=True)])


def ends(experts):
    return torch.searchsorted(torch.tensor(experts), torch.arange(E), right=True).to(torch.int32)


# --- products -------------------------------------------------------------------------------------

SPELLINGS = {
    "one expert's linear": lambda x, w: F.linear(x, w[2]),
    "its matrix": lambda x, w: x @ w.mT[2],
    "grouped_mm": lambda x, w: F.grouped_mm(x, w.mT, offs=ends(SORTED)),
    "transformers' fallback": lambda x, w: torch.ops.transformers.grouped_mm_fallback(
        x, w.mT, offs=ends(SORTED)
    ),
    "bmm(w[i], x)": lambda x, w: torch.bmm(w[torch.tensor(MIXED)], x.unsqueeze(-1)).squeeze(-1),
    "bmm(x, w[i])": lambda x, w: torch.bmm(x.unsqueeze(1), w[torch.tensor(MIXED)].mT).squeeze(1),
    "x @ index_select": lambda x, w: (
        x.unsqueeze(1) @ w.index_select(0, torch.tensor(MIXED)).mT
    ).squeeze(1),
    "bmm of every expert": lambda x, w: torch.bmm(x[:8].view(E, 2, K), w.mT).view(8, N),
}
EXPERTS_OF = {
    "one expert's linear": [2] * S,
    "its matrix": [2] * S,
    "grouped_mm": SORTED,
    "transformers' fallback": SORTED,
    "bmm of every expert": [0, 0, 1, 1, 2, 2, 3, 3],
}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
@each_scheme
@torch.no_grad()
def test_each_row_meets_its_experts_matrix(name, spelling, is_transposed, monkeypatch):
    import transformers.integrations.moe  # noqa: F401  (registers the fallback)

    x, module = rows(), quantized(name, is_transposed)
    weight = module.up
    assert type(weight) is Int8Weight and weight.batch == (E,)
    values = weight.dequantize()
    # Never the values of all experts: each is de-quantised by itself, if at all.
    monkeypatch.setattr(Int8Weight, "dequantize", None)
    y = SPELLINGS[spelling](x, weight.mT if is_transposed else weight)
    expected = one_by_one(name, x, EXPERTS_OF.get(spelling, MIXED))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    floats = SPELLINGS[spelling](x, values.mT if is_transposed else values)
    assert (y - floats).norm() < 0.02 * floats.norm()


@each_scheme
def test_the_values_are_those_of_each_matrix(name):
    weight, floats = quantized(name).up, Experts().up.detach()
    choice = int8fx.SCHEMES[name].choice(**SETTINGS[name])
    kept = choice.weight_format
    expected = torch.stack([kept.dequantize(kept.quantize(matrix), N, K) for matrix in floats])
    assert torch.equal(weight.dequantize(), expected)
    turned = quantized(name, is_transposed=True).up
    assert turned.shape == (E, K, N) and torch.equal(turned.dequantize(), expected.mT)
    assert weight.int8_bytes < 0.5 * floats.nbytes


@each_scheme
def test_opcheck_and_gradient(name):
    weight = quantized(name).up
    how = (*as_text(weight.choice), list(weight.tensors))
    x, experts = rows().requires_grad_(), torch.tensor(MIXED)
    torch.library.opcheck(scheme_expert_linear, (x, *how, experts, None))
    grad = torch.randn(S, N, generator=torch.Generator().manual_seed(2))
    scheme_expert_linear(x, *how, experts, None).backward(grad)
    expected = torch.einsum("sn,snk->sk", grad, weight.dequantize()[experts])
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_row_without_an_expert_is_zero_and_a_wrong_one_is_named():
    weight = quantized("nf4").up
    how = (*as_text(weight.choice), list(weight.tensors))
    y = scheme_expert_linear(rows()[:2], *how, torch.tensor([E, 1]), None)
    assert not y[0].any() and y[1].any()
    with pytest.raises(IndexError, match="expert 7 of 4"):
        scheme_expert_linear(rows()[:2], *how, torch.tensor([7, 1]), None)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        weight.select(0, 4)


# --- models ---------------------------------------------------------------------------------------


def toy(model_type, name="w4a16-group", implementation=None, **settings):
    found = build(model_type)
    if implementation is not None:
        found.model.set_experts_implementation(implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays in float
        int8fx.quantize_(found.model, scheme=name, **settings)
    return found


def experts_of(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, Int8Weight) and p.batch}


def logits(found):
    with torch.no_grad():
        return found.model(**found.inputs).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["w4a16-group", "w4a8-group", "nf4"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_computes_by_packed_experts(model_type, name, implementation):
    found = toy(model_type, name, implementation)
    kept = experts_of(found.model)
    assert {path.split(".")[-1] for path in kept} == {"gate_up_proj", "down_proj"}
    y = logits(found)
    reference = copy.deepcopy(found)
    int8fx.dequantize_(reference.model)
    assert not experts_of(reference.model)
    expected = logits(reference)
    bound = 0.05 if name == "w4a8-group" else 1e-4  # x is in int8, too
    assert (y - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["w4a16-group", "nf4"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_compiles_to_the_same(model_type, name, implementation):
    found = toy(model_type, name, implementation)
    expected = logits(found)
    compiled = torch.compile(found.model, backend="llmint8", fullgraph=True)
    with torch.no_grad():
        results = []
        (report,) = reports_of(lambda: results.append(compiled(**found.inputs).logits))
    experts = [decision for decision in report.decisions if decision.experts]
    assert experts and all(decision.accepted and decision.scheme == name for decision in experts)
    assert all(EACH in decision.note for decision in experts)
    assert all(("de-quantised" in decision.note) is (name == "nf4") for decision in experts)
    assert (results[0] - expected).norm() < 1e-4 * expected.norm()


def test_the_float_model_compiles_to_what_the_quantised_does():
    found = build("mixtral")
    options = {"scheme": "w4a16-group"}
    with torch.no_grad():
        torch._dynamo.reset()
        y = torch.compile(found.model, backend="llmint8", options=options)(**found.inputs).logits
        int8fx.quantize_(found.model, **options)
        torch._dynamo.reset()
        again = torch.compile(found.model, backend="llmint8")(**found.inputs).logits
    assert torch.equal(y, again)


# --- what a weight goes through -------------------------------------------------------------------


def assert_same(found, other):
    mine, others = experts_of(found.model), experts_of(other.model)
    assert mine.keys() == others.keys() and mine
    for path, weight in mine.items():
        assert torch.equal(weight, others[path]) and weight.options == others[path].options
    assert torch.equal(logits(found), logits(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_type", MODELS)
def test_copies_and_pickles(model_type, copied):
    found = toy(model_type)
    twin = toy(model_type)
    twin.model = copied(found.model)
    assert_same(found, twin)


@pytest.mark.parametrize("zipped", [True, False])
@each_scheme
def test_torch_save_with_weights_only(name, zipped, tmp_path):
    weight = quantized(name, is_transposed=True).up
    torch.save(weight, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    read = torch.load(tmp_path / "file.pt", weights_only=True)
    assert torch.equal(read, weight) and read.batch == (E,) and read.shape == (E, K, N)
    torch.testing.assert_close(read.dequantize(), weight.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_state_dict_holds_parts_and_is_read(model_type):
    found, other = toy(model_type), toy(model_type)
    for parameter in other.model.parameters():
        if not isinstance(parameter, Int8Weight):
            parameter.data.zero_()
    for weight in experts_of(other.model).values():
        with torch.no_grad():
            weight.copy_(torch.zeros(weight.shape))
    state = found.model.state_dict()
    path, weight = next(iter(experts_of(found.model).items()))
    assert path not in state and state[f"{path}_packed"].shape[:2] == (*weight.batch, weight.N)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    other.model.load_state_dict(state)
    assert_same(found, other)
    # Float experts are quantised on loading.
    floats = build(model_type).model.state_dict()
    other.model.load_state_dict(floats)
    assert_same(found, other)


def test_a_wrong_shape_in_a_state_dict_is_named():
    module = quantized("nf4")
    state = module.state_dict()
    state["up_packed"] = state["up_packed"][:3]
    int8fx.quantize_(other := nn.ModuleDict({"a": Experts()}), scheme="nf4", **SETTINGS["nf4"])
    with pytest.raises(int8fx.errors.CheckpointError, match=r"a.up_packed: shape \[3, 24, 24\]"):
        other.load_state_dict({f"a.{key}": value for key, value in state.items()})


@pytest.mark.parametrize("model_type", MODELS)
def test_a_checkpoint_comes_back(model_type, tmp_path):
    found, other = toy(model_type), build(model_type)
    int8fx.save_checkpoint(found.model, tmp_path)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    int8fx.quantize_(other.model, scheme="w4a16-group")
    int8fx.load_checkpoint(other.model, tmp_path)
    assert_same(found, other)


def test_on_meta_it_takes_a_state_dict():
    module = quantized("w4a8-group")
    with torch.device("meta"):
        empty = Experts()
    int8fx.quantize_(empty, scheme="w4a8-group", **SETTINGS["w4a8-group"])
    assert empty.up.is_meta and empty.up.shape == (E, N, K)
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty.up, module.up)
    assert torch.equal(empty.up.dequantize(), module.up.dequantize())


@pytest.mark.parametrize(
    ("model_type", "name", "settings"),
    [
        *((model_type, "w4a16-group", {}) for model_type in MODELS),
        ("mixtral", "wna16-group", {"bits": 3, "act_order": True}),
        ("qwen3_moe", "w4a8-group", {}),
        ("gpt_oss", "nf4", {}),
    ],
)
def test_save_pretrained_writes_what_is_read(model_type, name, settings, tmp_path):
    from transformers import AutoModelForCausalLM

    found, other = (toy(model_type, name, **settings) for _ in range(2))
    found.model.save_pretrained(tmp_path)
    # The float parts as well: nothing may be left as transformers initialises it.
    read = build(model_type)
    read.model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=found.model.dtype)
    assert_same(found, read)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.copy_(torch.zeros(parameter.shape))
    int8fx.load_checkpoint(other.model, tmp_path)
    assert_same(found, other)


def test_experts_on_disk_are_refused_by_name(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    toy("mixtral").model.save_pretrained(tmp_path / "files")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    with pytest.raises(ValueError, match=r"layers\.0\..*experts.*: quantised experts are read"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "files", device_map=places, offload_folder=tmp_path / "disk"
        )


def test_a_model_that_was_saved_is_saved_again_and_dequantised(tmp_path):
    from transformers import AutoModelForCausalLM

    found = toy("mixtral")
    found.model.save_pretrained(tmp_path / "first")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=found.model.dtype)
    read.save_pretrained(tmp_path / "second")
    again = build("mixtral")
    again.model = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=found.model.dtype)
    assert_same(found, again)
    # In float it has the names that everything knows.
    int8fx.dequantize_(again.model).save_pretrained(tmp_path / "float")
    names = load_file(tmp_path / "float" / "model.safetensors")
    assert any(name.endswith("experts.0.w1.weight") for name in names)
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=found.model.dtype)
    assert all(
        torch.equal(each, floats.get_parameter(path)) for path, each in again.model.named_parameters()
    )


@pytest.mark.filterwarnings("ignore:quantize_ leaves")
@pytest.mark.parametrize("how", [{"skip": ["+*.experts.*"]}, {"method": "hqq"}])
def test_experts_that_stay_in_float_are_saved(how, tmp_path):
    from transformers import AutoModelForCausalLM

    found = build("qwen3_moe")
    int8fx.quantize_(found.model, scheme="w4a16-group", **how)
    assert not experts_of(found.model)
    expected = logits(found)
    found.model.save_pretrained(tmp_path)
    found.model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=found.model.dtype)
    assert torch.equal(logits(found), expected)


def test_rules_of_experts_are_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    found = build("qwen3_moe")
    int8fx.quantize_(found.model, scheme="int8-rotated", rules=[("*.experts.*", "nf4", {})])
    assert experts_of(found.model)
    found.model.save_pretrained(tmp_path)
    read = build("qwen3_moe")
    read.model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=found.model.dtype)
    assert_same(found, read)


def test_a_broken_part_of_experts_is_named(tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    toy("gpt_oss").model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("experts.down_proj_packed"))
    save_file(tensors | {name: tensors[name][:1]}, file, {"format": "pt"})
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "experts.down_proj_packed: shape [1, " in caplog.text


def test_from_pretrained_quantises_them(tmp_path):
    from transformers import AutoModelForCausalLM

    from int8fx.integrations.transformers import Int8FxConfig

    found = build("qwen3_moe")
    found.model.save_pretrained(tmp_path)
    config = Int8FxConfig(scheme="w4a16-group")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    int8fx.quantize_(found.model, scheme="w4a16-group")
    mine, others = experts_of(found.model), experts_of(read)
    assert mine.keys() == others.keys() and mine
    assert all(torch.equal(mine[path], others[path]) for path in mine)


# --- what stays in float --------------------------------------------------------------------------


def reason_of(module, **options):
    (decision,) = [each for each in int8fx.decisions(module, **options) if each.experts]
    return decision.reason


def test_reasons():
    module = Experts()
    assert reason_of(module, scheme="nf4") == ""
    assert "the backend quantises them" in reason_of(module)
    assert reason_of(module, scheme="nf4", skip=["up"]) == "skip: matches 'up'"
    assert reason_of(quantized("nf4"), scheme="nf4").startswith("already NF4")
    del module.is_transposed
    assert "has no is_transposed" in reason_of(module, scheme="nf4")
    model = nn.ModuleDict({"experts": module, "out": nn.Linear(K, K)})
    with pytest.warns(UserWarning, match="quantize_ leaves .* experts, in experts.up"):
        int8fx.quantize_(model, scheme="nf4")


def test_another_method_leaves_them_and_says_so():
    model = nn.ModuleDict({"experts": Experts(), "out": nn.Linear(K, K)})
    with pytest.warns(UserWarning, match="quantize_ leaves"):
        int8fx.quantize_(model, scheme="w4a16-group", method="hqq")
    assert not experts_of(model) and type(model["out"].weight) is Int8Weight


def test_qat_says_that_experts_are_trained_in_float():
    model = nn.ModuleDict({"experts": Experts(), "out": nn.Linear(K, K)})
    with pytest.warns(UserWarning, match=r"experts of ModuleDict as they are, experts\.up among them"):
        int8fx.prepare_qat_(model, scheme="nf4")
    assert experts_of(int8fx.convert_qat_(model)).keys() == {"experts.up"}
