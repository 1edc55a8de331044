"""Every scheme of the table, and one of another package, through everything that a weight goes through.

The other one is ``int8fx/testing/four_bits.py``: 4-bit weights, two in a byte, by groups along K, with
zero points and a setting of its own. Nothing else of int8fx knows of it.
"""

import copy
import pickle
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CheckpointError, ReleasedWeightError
from int8fx.kernels import table
from int8fx.testing.four_bits import W4A16
from int8fx.testing.support import Mlp, compile_once

K, N = 64, 96
NAMES = [*int8fx.SCHEMES, W4A16.name]
# What differs from the defaults, where a scheme has settings.
SETTINGS = {
    "llm.int8": {"threshold": 3.0, "decomposition": "token"},
    "llm.int8-zeropoint": {"threshold": 3.0},
    "int8-rotated": {"block": 32, "rotation": "random-signs"},
    "w8a16-group": {"group_size": 32},
    "w4a16-group": {"group_size": 16, "zeros": "middle", "act_order": True},
    "w4a8-group": {"group_size": 16, "block": 32},
    "wna16-group": {"group_size": 32, "zeros": "offset", "bits": 6},
    "nf4": {"blocksize": 32},
    W4A16.name: {"group": 32},
}
# Of those of the float model, at most.
BYTES = {W4A16.name: 0.2, "w4a16-group": 0.21, "w4a8-group": 0.35, "wna16-group": 0.32, "nf4": 0.19}
NO_KERNEL = ("w8a16-group", "wna16-group", "nf4", W4A16.name)
each_scheme = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def another_package(monkeypatch):
    """What importing it would do."""
    monkeypatch.setitem(int8fx.SCHEMES, W4A16.name, W4A16)
    yield
    table.kernel_for.cache_clear()


def model_of(seed=0, width=K):
    torch.manual_seed(seed)
    return Mlp(width, N).requires_grad_(False)


def quantized(name, seed=0, width=K):
    return int8fx.quantize_(model_of(seed, width), scheme=name, **SETTINGS.get(name, {}))


def batch(width=K):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    x[2, 7] = 30.0
    return x


def options_of(name):
    return {"scheme": name, **SETTINGS.get(name, {})}


def assert_same(model, other):
    for weight, copied in zip(weights_of(model), weights_of(other), strict=True):
        assert torch.equal(weight, copied) and weight.options == copied.options
    assert torch.equal(model(batch()), other(batch()))


def weights_of(model):
    return [model.up.weight, model.down.weight]


def assert_near_float(y, floats, x):
    """Rounding to a few bits; a scale or a group in a wrong place is an error of the output's size."""
    exact = floats(x)
    assert 1e-4 < (y - exact).norm() / exact.norm() < 0.15


@each_scheme
def test_the_float_model_compiles(name):
    model, x = model_of(), batch()
    y, report = compile_once(model, x, backend_options=options_of(name))
    assert [decision.scheme for decision in report.decisions] == [name, name]
    assert_near_float(y, model, x)
    scheme = int8fx.SCHEMES[name]
    settings = scheme.choice(**SETTINGS.get(name, {})).settings
    linear, _ = compile_once(model.up, x, backend_options=options_of(name))
    expected = scheme.reference(x, model.up.weight, model.up.bias, settings)
    torch.testing.assert_close(linear.double(), expected, rtol=1e-4, atol=1e-4)


@each_scheme
def test_quantised_it_compiles_to_what_the_float_model_does(name):
    x = batch()
    expected, of_float = compile_once(model_of(), x, backend_options=options_of(name))
    model = quantized(name)
    y, report = compile_once(model, x)
    assert torch.equal(y, expected)
    assert [decision.scheme for decision in report.decisions] == [name, name]
    assert (report.float_bytes, report.int8_bytes) == (of_float.float_bytes, of_float.int8_bytes)
    assert report.int8_bytes < BYTES.get(name, 0.45) * report.float_bytes
    torch.testing.assert_close(model(x), y)


@each_scheme
def test_a_weight_says_what_it_is(name):
    model = quantized(name)
    for weight in weights_of(model):
        assert type(weight) is Int8Weight and isinstance(weight, nn.Parameter)
        assert weight.options == {**int8fx.SCHEMES[name].choice().options, **options_of(name)}
        assert f"scheme='{name}'" in repr(weight)
    reasons = {decision.path: decision.reason for decision in int8fx.decisions(model, scheme=name)}
    kept = weights_of(model)[0].weight_format
    kind = "in int8" if kept.bits == 8 else kept.name
    assert name != W4A16.name or kind == "int4 by groups of 32, with zero points"
    assert reasons == dict.fromkeys(["up", "down"], f"already {kind}")


@each_scheme
def test_a_model_on_meta_takes_a_state_dict(name):
    model, other = quantized(name), quantized(name, seed=5)
    other.load_state_dict(model.state_dict())
    assert_same(other, model)
    with torch.device("meta"):
        empty = Mlp(K, N).requires_grad_(False)
    int8fx.quantize_(empty, **options_of(name))
    assert all(weight.is_meta for weight in weights_of(empty))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same(empty, model)
    again = quantized(name, seed=5)
    again.load_state_dict(model_of().state_dict())
    assert_same(again, model)


@each_scheme
def test_a_checkpoint_comes_back(name, tmp_path):
    model = quantized(name)
    int8fx.save_checkpoint(model, tmp_path)
    assert_same(int8fx.load_checkpoint(quantized(name, seed=5), tmp_path), model)
    with torch.device("meta"):
        empty = Mlp(K, N).requires_grad_(False)
    read = int8fx.load_checkpoint(int8fx.quantize_(empty, **options_of(name)), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # nothing of it is mapped any more
    assert_same(read, model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@each_scheme
def test_copies_and_pickles(name, copied):
    model = quantized(name)
    twin = copied(model)
    assert_same(twin, model)
    for mine, other in zip(weights_of(model), weights_of(twin), strict=True):
        pairs = zip(mine.tensors, other.tensors, strict=True)
        # Tensors without elements, as of no columns, are nowhere.
        assert all(left.data_ptr() != right.data_ptr() for left, right in pairs if left.numel())


@pytest.mark.parametrize("zipped", [True, False])
@each_scheme
def test_torch_save_with_weights_only(name, zipped, tmp_path):
    weight = quantized(name).up.weight
    torch.save(weight, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    read = torch.load(tmp_path / "file.pt", weights_only=True)
    assert torch.equal(read, weight) and read.options == weight.options


@each_scheme
def test_slices_stay_quantised_and_multiply_as_parts_of_the_product(name):
    linear, x = quantized(name).up, batch()
    weight = linear.weight
    for rows in (weight[: N // 2], weight[N // 2 :], weight.chunk(3)[1]):
        assert type(rows) is Int8Weight
    rows = torch.cat([nn.functional.linear(x, part) for part in weight.chunk(2)], -1)
    torch.testing.assert_close(rows, nn.functional.linear(x, weight))
    left, right = weight.split(K // 2, 1)
    # Blocks of a rotation are those of all columns: a piece of them is a float copy.
    cuts = weight.weight_format.can_cut(slice(0, N), slice(0, K // 2), N, K)
    assert (type(left) is Int8Weight) is (type(right) is Int8Weight) is cuts
    # Nor are the columns of a group beside each other with act-order. And 256 blocks of 32 columns
    # share what an absmax in 8 bits is scaled by.
    assert cuts is (name not in ("int8-rotated", "w4a8-group", "w4a16-group", "nf4"))
    assert torch.equal(torch.cat([left.dequantize(), right.dequantize()], 1), weight.dequantize())
    halves = [nn.functional.linear(x[:, :32], left), nn.functional.linear(x[:, 32:], right)]
    floats = nn.functional.linear(x, weight.dequantize())
    assert (sum(halves) - floats).norm() < 0.1 * floats.norm()


@pytest.mark.parametrize("name", ["w8a16-group", W4A16.name])
def test_a_cut_inside_of_a_group_is_a_float_copy(name):
    weight = quantized(name).up.weight
    for cut in (weight[:, 8:40], weight[:, :48]):
        assert type(cut) is not Int8Weight
    assert torch.equal(weight[:, 8:40].clone(), weight.dequantize()[:, 8:40])
    with pytest.raises(RuntimeError, match="read-only"):
        weight[:, 8:40].zero_()


@each_scheme
def test_what_is_written_to_a_slice_is_written_to_the_weight(name):
    weight, other = (quantized(name, seed).up.weight for seed in (0, 5))
    expected = weight.dequantize()
    expected[32:64] = other.dequantize()[32:64]
    weight[32:64].copy_(other[32:64])
    assert torch.equal(weight.dequantize(), expected)
    y = nn.functional.linear(batch(), weight)
    fresh = pickle.loads(pickle.dumps(weight))  # packed anew, with whatever is derived
    assert torch.equal(nn.functional.linear(batch(), fresh), y)


@each_scheme
def test_adding_to_it_quantises_the_sum(name):
    weight, addend = quantized(name).up.weight, torch.randn(N, K) / 10
    expected = Int8Weight.from_float(weight.dequantize() + addend, **weight.options)
    weight.add_(addend)
    assert torch.equal(weight, expected)


@each_scheme
def test_dequantize_is_the_way_back(name):
    model = quantized(name)
    values = [weight.dequantize() for weight in weights_of(model)]
    int8fx.dequantize_(model)
    assert all(type(weight) is nn.Parameter for weight in weights_of(model))
    assert all(map(torch.equal, weights_of(model), values))


@each_scheme
def test_gradients_of_the_input_are_straight_through(name):
    linear, x = quantized(name).up, batch().requires_grad_()
    grad = torch.randn(5, N, generator=torch.Generator().manual_seed(2))
    linear(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ linear.weight.dequantize(), rtol=1e-4, atol=1e-4)


@each_scheme
def test_half_precision_and_another_backend(name):
    model, x = quantized(name).to(torch.bfloat16), batch().to(torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)


@each_scheme
def test_a_kernel_or_the_reason_why_there_is_none_is_shown(name):
    model, x = model_of(), batch()
    _, report = compile_once(model, x, backend_options=options_of(name))
    explained = int8fx.explain(model, x, options=options_of(name))
    kept = int8fx.SCHEMES[name].choice(**SETTINGS.get(name, {})).weight_format.name
    note = f"no kernel for {kept}: de-quantised at each call and multiplied in float"
    has_none = name in NO_KERNEL
    assert [decision.note for decision in report.decisions] == [note if has_none else ""] * 2
    assert (note in str(report)) is has_none
    assert [row.note for row in explained.rows] == [note if has_none else ""] * 2
    assert ("no kernel for" in re.sub(r"\s+", " ", str(explained))) is has_none
    assert [row.scheme for row in explained.rows] == [name, name]
    assert explained.totals.kept_bytes == report.int8_bytes


@each_scheme
def test_release_leaves_what_was_compiled_alone(name):
    expected, _ = compile_once(model_of(), batch(), backend_options=options_of(name))
    model = model_of()
    torch._dynamo.reset()
    released = {**options_of(name), "release_weights": True}
    compiled = torch.compile(model, backend="llmint8", options=released, dynamic=False)
    assert torch.equal(compiled(batch()), expected) and torch.equal(compiled(batch()), expected)
    assert [type(weight) for weight in weights_of(model)] == [Int8Weight, Int8Weight]
    with pytest.raises(ReleasedWeightError, match=r"int8fx\.quantize_\(model\)"):
        model(batch())
    int8fx.quantize_(model)
    assert_same(model, quantized(name))
    assert torch.equal(compiled(batch()), expected)


@each_scheme
def test_evaluate_compares_it(name):
    from rich.console import Console

    from int8fx.analysis.evaluate import FLOAT, Settings, contender, evaluate

    spec = ",".join([name, *(f"{key}={value}" for key, value in SETTINGS.get(name, {}).items())])
    assert contender(spec) == options_of(name)
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (64,))
    settings = Settings({name: contender(spec)}, windows=2, length=16)
    scores = evaluate(Tiny(), tokens, settings, "tiny", Console(quiet=True)).accuracies
    assert scores[FLOAT].mean_kl == 0 and 0 < scores[name].mean_kl < 0.1


class Tiny(nn.Module):
    """A language model of one layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(50, K), Mlp(K, N)
        self.head = nn.Linear(K, 50)
        self.requires_grad_(False)

    def forward(self, input_ids, use_cache=False):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(self.body(self.embedding(input_ids))))


# --- a kernel that lays it out ---------------------------------------------------------------------


def test_what_is_stored_does_not_depend_on_a_kernels_layout(monkeypatch, tmp_path):
    """A layout of the same shape and another order: nothing but the kernel's row knows it."""
    plain = quantized(W4A16.name)
    family = plain.up.weight.weight_format.family
    row = table.Kernel(
        "rows upside down",
        load=lambda: None,
        pack=lambda codes: torch.cat([codes.flip(0), codes[:1]]),
        packed_shape=lambda rows, columns: (rows + 1, columns),
        unpack=lambda packed, rows, columns: packed[:rows].flip(0),
    )
    monkeypatch.setitem(table.KERNELS, table.key_of("cpu", family, W4A16.operator), row)
    table.kernel_for.cache_clear()
    model = quantized(W4A16.name)
    assert model.up.weight.packed.shape == (N + 1, K // 2)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert torch.equal(pickle.loads(pickle.dumps(plain)).up.weight, model.up.weight)
    assert torch.equal(model.up.weight[:32].dequantize(), plain.up.weight[:32].dequantize())
    assert torch.equal(model(batch()), plain(batch()))
    y, report = compile_once(model, batch())
    assert [decision.note for decision in report.decisions] == ["", ""]
    torch.testing.assert_close(y, plain(batch()))
    torch._dynamo.reset()
    exported = torch.compile(model, backend="aot_eager", fullgraph=True)(batch())
    assert torch.equal(exported, plain(batch()))


# --- what does not fit ---------------------------------------------------------------------------


def test_files_are_the_formats_own_and_say_what_they_are(tmp_path):
    int8fx.save_checkpoint(quantized(W4A16.name), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        up = {name: opened.get_slice(name) for name in opened.keys() if name.startswith("up.")}  # noqa: SIM118
        forms = {name: (each.get_dtype(), each.get_shape()) for name, each in up.items()}
    assert forms["up.weight_packed"] == ("U8", [N, K // 2])
    assert forms["up.weight_scale"] == ("F32", [N, K // 32])
    assert forms["up.weight_zero_point"] == ("U8", [N, K // 32])
    assert "up.weight_scheme" in forms and "up.weight" not in forms


def test_another_group_is_refused_by_name_and_the_model_is_as_it_was(tmp_path):
    int8fx.save_checkpoint(quantized(W4A16.name), tmp_path)
    model = int8fx.quantize_(model_of(5), scheme=W4A16.name, group=16)
    before = model(batch())
    message = (
        "up.weight: int4 by groups of 32, with zero points in the checkpoint, "
        "int4 by groups of 16, with zero points in the model"
    )
    with pytest.raises(CheckpointError, match=message):
        int8fx.load_checkpoint(model, tmp_path)
    assert torch.equal(model(batch()), before)


@pytest.mark.parametrize("other", ["llm.int8", "w8a16-group"])
def test_files_of_another_format_are_refused(other, tmp_path):
    int8fx.save_checkpoint(quantized(W4A16.name), tmp_path)
    with pytest.raises(
        CheckpointError, match="int4 by groups of 32, with zero points in the checkpoint"
    ):
        int8fx.load_checkpoint(quantized(other), tmp_path)
    int8fx.save_checkpoint(quantized(other), tmp_path)
    with pytest.raises(CheckpointError, match=r"up.weight"):
        int8fx.load_checkpoint(quantized(W4A16.name), tmp_path)


@pytest.mark.parametrize("part", ["packed", "scale", "zero_point", "scheme"])
def test_a_part_that_is_missing_or_damaged_is_named(part):
    model, state = quantized(W4A16.name), quantized(W4A16.name, 5).state_dict()
    whole = dict(state)
    del state[f"down.weight_{part}"]
    with pytest.raises(CheckpointError, match=f"down.weight: down.weight_{part} is missing"):
        model.load_state_dict(state)
    if part != "scheme":
        with pytest.raises(CheckpointError, match=rf"down.weight_{part}: shape \[63, "):
            model.load_state_dict(whole | {f"down.weight_{part}": whole[f"down.weight_{part}"][:-1]})
    with pytest.raises(CheckpointError, match=f"down.weight_{part}: "):
        model.load_state_dict(whole | {f"down.weight_{part}": whole[f"down.weight_{part}"].half() * 2})


def test_k_need_not_be_a_multiple_of_the_group():
    model, x = quantized(W4A16.name, width=40), batch(40)
    assert model.up.weight.tensors[0].shape == (N, 32)
    assert_near_float(model(x), model_of(width=40), x)
    y, _ = compile_once(model, x)
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "w4a16", "group": 7}, ["'group'", "given 7 (int)", "a multiple of 2"]),
        ({"scheme": "w4a16", "threshold": 3.0}, ["'threshold'", "'w4a16' reads: group"]),
        ({"group": 32}, ["'group'", "'llm.int8' reads: columns, decomposition, threshold"]),
        ({"scheme": "w4a16", "groups": 32}, ["unknown option 'groups'", "allowed:", "group,"]),
        ({"scheme": "w8a16", "threshold": 3.0}, ["'threshold'", "'w8a16' reads: none"]),
    ],
)
def test_settings_that_a_scheme_does_not_have_are_named_with_what_it_has(options, words):
    for call in (
        lambda: int8fx.quantize_(model_of(), **options),
        lambda: int8fx.Options.parse(options),
        lambda: int8fx.explain(model_of(), batch(), options=options),
    ):
        with pytest.raises(ValueError, match="option") as raised:
            call()
        assert [word for word in words if word not in str(raised.value)] == []


def test_a_weight_whose_package_is_not_imported_says_so(monkeypatch, tmp_path):
    pickled = pickle.dumps(quantized(W4A16.name).up.weight)
    int8fx.save_checkpoint(quantized(W4A16.name), tmp_path)
    monkeypatch.delitem(int8fx.SCHEMES, W4A16.name)
    with pytest.raises(ValueError, match=r"scheme 'w4a16' is not in int8fx.SCHEMES"):
        pickle.loads(pickled)
    with pytest.raises(
        CheckpointError, match=r"up.weight_scheme: scheme 'w4a16' is not in int8fx.SCHEM"
    ):
        int8fx.load_checkpoint(quantized("llm.int8"), tmp_path)


def test_models_of_other_settings_are_compiled_apart():
    """The same functions, in graphs that differ by what is bound to them alone."""
    model, x = model_of().up, batch()
    for group in (16, 64, 16):
        y, _ = compile_once(model, x, backend_options={"scheme": W4A16.name, "group": group})
        settings = W4A16.choice(group=group).settings
        expected = W4A16.reference(x, model.weight, model.bias, settings)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@each_scheme
def test_conv1d_of_hugging_face_keeps_its_shape(name, tmp_path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, x = nn.Sequential(Conv1D(N, K)).requires_grad_(False), batch()
    y, _ = compile_once(copy.deepcopy(conv), x, backend_options=options_of(name))
    other = copy.deepcopy(conv)
    nn.init.zeros_(other[0].weight)
    for each in (conv, other):
        int8fx.quantize_(each, **options_of(name))
    assert conv[0].weight.shape == (K, N) and conv[0].weight.transposed
    torch.testing.assert_close(conv(x), y)
    int8fx.save_checkpoint(conv, tmp_path)
    assert torch.equal(int8fx.load_checkpoint(other, tmp_path)(x), conv(x))
    assert torch.equal(conv[0].weight[:, :48].dequantize(), conv[0].weight.dequantize()[:, :48])
