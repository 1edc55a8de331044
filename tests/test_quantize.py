"""quantize_ and dequantize_: what becomes of a model, and of its weights wherever they are read."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import int8fx
from int8fx import Int8Weight
from int8fx.kernels import table
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.kernels.packing import pack_codes
from int8fx.passes.graph.weight_expression import TRANSPOSE, WeightExpression
from int8fx.testing.bounds import expected_and_bound
from int8fx.testing.support import compile_once
from int8fx.weights.store import weight_reason

K, N = 64, 96


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.lm_head = nn.Linear(K, 10)

    def forward(self, x):
        return self.lm_head(x + self.down(torch.relu(self.up(self.norm(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def x():
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1))
    x[0, 2, 7] = 30.0
    return x


def weight_of(linear, **options):
    options = {"threshold": 6.0, "decomposition": "column"} | options
    return nn.Parameter(Int8Weight.from_float(linear.weight, **options), requires_grad=False)


# --- quantize_ -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_float_model_compiled_bit_for_bit(model, x, dtype):
    model, x = model.to(dtype), x.to(dtype)
    expected, of_float = compile_once(model, x)
    assert int8fx.quantize_(model) is model
    y, report = compile_once(model, x)
    assert torch.equal(y, expected)
    assert [d.path for d in report.accepted] == ["up", "down"]
    assert (report.float_bytes, report.int8_bytes) == (of_float.float_bytes, of_float.int8_bytes)
    # The nodes that read the weights are the same; the float weights are inputs no more.
    assert report.graph == of_float.graph


def test_eagerly_it_computes_the_same_scheme(model, x):
    linear = model.up
    expected, bound = expected_and_bound(x, linear.weight, linear.bias, 6.0, "column")
    compiled, _ = compile_once(linear, x)
    int8fx.quantize_(linear)
    assert ((linear(x).double() - expected).abs() <= bound).all()
    assert torch.equal(linear(x), compiled)
    with torch.inference_mode():
        assert torch.equal(linear(x), compiled)
        assert torch.equal(linear.weight[3:9].t(), linear.weight.dequantize()[3:9].t())


def test_the_module_keeps_its_class_and_names(model):
    before = {name: type(module) for name, module in model.named_modules()}
    names = [name for name, _ in model.named_parameters()]
    int8fx.quantize_(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.up.weight) is Int8Weight and isinstance(model.up.weight, nn.Parameter)
    assert type(model.lm_head.weight) is nn.Parameter
    assert "Int8Weight(shape=[96, 64], dtype=torch.float32" in repr(model.up.weight)
    bytes_of_up = model.up.weight.int8_bytes
    assert f"bias=True, llm.int8, 8 bits, {bytes_of_up:,} bytes)" in repr(model.up)
    assert repr(model.lm_head) == repr(Model().lm_head)
    assert repr(copy.deepcopy(model)) == repr(model) == repr(pickle.loads(pickle.dumps(model)))
    assert repr(int8fx.dequantize_(model)) == repr(Model())


def test_int8_bytes(model):
    wide = nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16)
    float_bytes = wide.weight.nbytes
    int8fx.quantize_(wide)
    assert wide.weight.int8_bytes == wide.weight.packed.nbytes + wide.weight.w_scale.nbytes
    assert wide.weight.int8_bytes <= 0.51 * float_bytes
    assert wide.weight.numel() * wide.weight.element_size() == wide.weight.int8_bytes


def test_options_are_kept_with_the_weight_and_those_given_at_the_compile_go_first(model, x):
    int8fx.quantize_(model, threshold=3.0, decomposition="token", skip=[], only=["up"])
    assert (model.up.weight.threshold, model.up.weight.decomposition) == (3.0, "token")
    assert [d.reason for d in int8fx.decisions(model, only=["up"])] == [
        "already in int8",
        "only: matches none of its patterns",
        "skip: matches 'lm_head'",
    ]
    _, report = compile_once(model.up, x)
    assert "3.0, 'token'" in report.graph
    _, report = compile_once(model.up, x, backend_options={"threshold": 4.0})
    assert "4.0, 'token'" in report.graph


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 6.0}, "unknown option 'treshold' for quantize_; allowed: calibration, columns, "),
        ({"inductor": {}}, "unknown option 'inductor' for quantize_"),
        ({"threshold": -1}, "option 'threshold' of quantize_: given -1"),
        ({"only": ["nothing"]}, "found no weight to quantise in Model\n  up .*only: matches none"),
    ],
)
def test_a_refused_call_leaves_the_model_as_it_was(model, options, message):
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        int8fx.quantize_(model, **options)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_a_module_that_is_dropped_is_freed_at_once():
    module = int8fx.quantize_(nn.Sequential(nn.Linear(64, 64)))[0]
    copied, gone = pickle.loads(pickle.dumps(copy.deepcopy(module))), weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()
    assert "llm.int8, 8 bits" in repr(copied)


def test_one_float_weight_at_a_time(monkeypatch):
    """Each is gone before the next one's int8 form is made, so memory peaks one weight above."""
    model = nn.Sequential(*(nn.Linear(K, K, bias=False) for _ in range(4)))
    floats = [weakref.ref(linear.weight) for linear in model]
    quantize, alive = Int8Weight.from_float, []

    def counted(*args, **kwargs):
        alive.append(sum(each() is not None for each in floats))
        return quantize(*args, **kwargs)

    monkeypatch.setattr(Int8Weight, "from_float", counted)
    int8fx.quantize_(model)
    assert alive == [4, 3, 2, 1]
    assert all(each() is None for each in floats)


def test_quantising_again_changes_nothing(model):
    weight = int8fx.quantize_(model).up.weight
    assert int8fx.quantize_(model).up.weight is weight


class Overrides(nn.Linear):
    def forward(self, x):
        return x @ self.weight.exp().t()


def test_what_is_refused_and_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, K)
            self.tied = nn.Linear(K, 10)
            self.tied.weight = self.embedding.weight
            self.attention = nn.MultiheadAttention(K, 2)
            self.overrides = Overrides(K, K)
            self.double = nn.Linear(K, K, dtype=torch.float64)
            self.empty = nn.Linear(K, 0)
            self.long = nn.Linear(140_000, 1)
            self.view = nn.Linear(K, 2)
            self.register_buffer("fused", torch.randn(4, K))
            self.view.weight = nn.Parameter(self.fused[:2])
            self.sparse = nn.Linear(K, K)

    reasons = {d.path: d.reason for d in int8fx.decisions(Model())}
    assert reasons == {
        "tied": "skip: the output head (its weight is also an embedding)",
        "attention.out_proj": "its projections are inside one fused call of torch",
        "overrides": "Overrides overrides the forward of Linear",
        "double": "weight of torch.float64: int8 takes the place of fp32, bf16 and fp16",
        "empty": f"the weight has shape [0, {K}]",
        "long": "K = 140000 could overflow an int32 sum (at most 133144)",
        "view": "shares memory with fused, which stays in float",
        "sparse": "",
    }
    reasons = {d.path: d.reason for d in int8fx.decisions(Model(), skip=[])}
    assert reasons["tied"] == "shares memory with embedding.weight, which stays in float"


def test_a_weight_that_a_skipped_module_shares_stays(model):
    model.again = nn.Linear(K, N)
    model.again.weight = model.up.weight
    reasons = {d.path: d.reason for d in int8fx.decisions(model, skip=["again"])}
    assert reasons["up"] == "shares memory with again.weight, which stays in float"
    assert reasons["down"] == ""


def test_a_shared_weight_is_quantised_once_and_stays_shared(model, x):
    model.again = nn.Linear(K, N)
    model.again.weight = model.up.weight
    model.twice = model.down
    int8fx.quantize_(model)
    assert model.again.weight is model.up.weight
    assert type(model.down.weight) is Int8Weight
    y = model.again(x) - model.again.bias
    torch.testing.assert_close(y, model.up(x) - model.up.bias)
    int8fx.dequantize_(model)
    assert model.again.weight is model.up.weight


def test_weights_that_are_views_of_one_tensor_are_quantised_each(x):
    fused = torch.randn(3 * N, K)
    views = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(3)).requires_grad_(False)
    for part, linear in zip(fused.chunk(3), views, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    int8fx.quantize_(views)
    for part, linear in zip(fused.chunk(3), views, strict=True):
        assert torch.equal(linear.weight.w_int8, quantize_weight(part)[0])


def test_a_buffer_as_a_weight_is_quantised(x):
    linear = nn.Linear(K, N).requires_grad_(False)
    weight = linear.weight.data
    del linear.weight
    linear.register_buffer("weight", weight)
    expected, report = compile_once(linear, x)
    assert report.accepted
    int8fx.quantize_(linear)
    assert type(linear.weight) is Int8Weight
    assert torch.equal(compile_once(linear, x)[0], expected)
    assert sorted(linear.state_dict()) == ["bias", "weight", "weight_scale"]


def test_the_packed_projection_of_multihead_attention_stays(x):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.up = nn.MultiheadAttention(K, 2, batch_first=True), nn.Linear(K, N)

        def forward(self, x):
            return self.up(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model = Attends().eval().requires_grad_(False)
    attended = model.attention(x, x, x)[0]
    int8fx.quantize_(model)
    assert type(model.attention.in_proj_weight) is nn.Parameter
    assert type(model.attention.out_proj.weight) is nn.Parameter
    assert type(model.up.weight) is Int8Weight
    assert torch.equal(model.attention(x, x, x)[0], attended)


def test_conv1d_of_hugging_face(x):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(N, K).requires_grad_(False)
    expected, _ = compile_once(conv, x)
    reference = conv.weight.clone()
    int8fx.quantize_(conv)
    assert conv.weight.shape == (K, N) and conv.weight.transposed
    assert torch.equal(conv(x), expected)
    y, report = compile_once(conv, x)
    assert report.accepted and torch.equal(y, expected)
    assert conv.state_dict()["weight"].shape == (1, K, N)
    w_int8, w_scale = quantize_weight(reference.t())
    int8fx.dequantize_(conv)
    assert torch.equal(conv.weight, (w_int8 * w_scale.unsqueeze(1)).t())


# --- dequantize_ ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_dequantize_gives_float_parameters_back(model, dtype):
    w_int8, w_scale = quantize_weight(model.up.weight)
    int8fx.quantize_(model)
    assert int8fx.dequantize_(model, dtype) is model
    assert type(model.up.weight) is nn.Parameter
    assert torch.equal(model.up.weight, (w_int8 * w_scale.unsqueeze(1)).to(dtype or torch.float32))
    assert sorted(model.state_dict()) == sorted(Model().state_dict())


def test_back_and_forth_gives_the_same_int8(model):
    weight = int8fx.quantize_(model).up.weight
    again = int8fx.quantize_(int8fx.dequantize_(model)).up.weight
    assert torch.equal(again.w_int8, weight.w_int8)


# --- moves and copies ----------------------------------------------------------------------------


def test_moves_leave_int8_alone(model, x):
    linear = nn.Linear(K, N, bias=False)
    compiled = torch.compile(int8fx.quantize_(linear), backend="llmint8")
    expected, weight, w_int8 = compiled(x), linear.weight, linear.weight.w_int8
    linear.half()
    assert linear.weight is weight and weight.dtype == torch.float16
    assert torch.equal(weight.w_int8, w_int8)
    assert compiled(x.half()).dtype == torch.float16
    linear.float().to("cpu")
    assert torch.equal(compiled(x), expected)


def test_without_a_gpu_cuda_is_refused_and_nothing_moves(model, x):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    int8fx.quantize_(model)
    weight, expected = model.up.weight, model(x)
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        model.cuda()
    assert model.up.weight is weight and torch.equal(model(x), expected)


def test_data_is_the_int8_form_and_can_be_replaced(model, x):
    weight, other = (int8fx.quantize_(m).up.weight for m in (model, Model()))
    assert torch.equal(weight.data, weight) and type(weight.data) is Int8Weight
    torch._dynamo.reset()
    compiled = torch.compile(model.up, backend="llmint8")
    before = compiled(x)
    weight.data = other.clone()
    assert torch.equal(weight, other) and torch.equal(weight.w_int8, other.w_int8)
    assert torch.equal(compiled(x), model.up(x)) and not torch.equal(compiled(x), before)
    floats = torch.randn(N, K)
    weight.data = floats
    assert torch.equal(weight.w_int8, quantize_weight(floats)[0])
    assert torch.equal(compiled(x), model.up(x))
    with pytest.raises(RuntimeError, match=r"shape \[96, 64\] cannot take.*shape \[3\]"):
        weight.data = torch.ones(3)


def test_to_meta(model, x):
    int8fx.quantize_(model)
    assert model.to("meta").up.weight.is_meta
    assert model(x.to("meta")).shape == (2, 5, 10)


def test_in_double_it_is_the_dequantised_weight(model, x):
    linear = int8fx.quantize_(model).up
    w_hat = linear.weight.dequantize(torch.float64)
    expected = x.double() @ w_hat.t() + linear.bias.double()
    torch.testing.assert_close(linear.double()(x.double()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(model, x, copied):
    int8fx.quantize_(model, threshold=3.0)
    twin = copied(model)
    assert isinstance(twin.up.weight, nn.Parameter) and twin.up.weight.threshold == 3.0
    assert torch.equal(twin(x), model(x))
    assert twin.up.weight.packed.data_ptr() != model.up.weight.packed.data_ptr()
    assert sorted(twin.state_dict()) == sorted(model.state_dict())


def test_a_pickle_does_not_depend_on_the_kernel(model, monkeypatch):
    weight = int8fx.quantize_(model).up.weight
    pickled = pickle.dumps(weight)
    monkeypatch.setattr(table, "kernel_for", lambda *key: table.REFERENCE)
    read = pickle.loads(pickled)
    assert read.packed.shape == (N, K)
    assert torch.equal(read.w_int8, weight.w_int8)


# --- reading and writing -------------------------------------------------------------------------


def test_it_reads_as_the_float_tensor_that_it_stands_for(model):
    weight = int8fx.quantize_(model).up.weight
    values = weight.dequantize()
    for read in (torch.sum, torch.abs, lambda w: w[3], lambda w: w[:, 1] @ w, lambda w: w.T @ w):
        torch.testing.assert_close(read(weight), read(values))
    for same in (weight.t().t(), weight.detach(), weight[:], weight.clone(), weight.view(-1)):
        assert type(same) is Int8Weight
    assert torch.equal(weight.clone(), weight) and not torch.equal(weight[1:], weight)


@pytest.mark.parametrize("take", [lambda w: w[16:48], lambda w: w[:, 3:40], lambda w: w.t()[5:]])
def test_parts_stay_int8_bit_for_bit(model, take):
    weight = int8fx.quantize_(model).up.weight
    part = take(weight)
    assert type(part) is Int8Weight
    assert torch.equal(part.dequantize(), take(weight.dequantize()))


@pytest.mark.parametrize(
    "take",
    [
        lambda w: w[16:48],
        lambda w: w.detach().narrow(0, 5, 1),
        lambda w: w[10:40][5:20].detach(),
        lambda w: w.t()[:, 3:9],
        lambda w: w.chunk(3)[1],
    ],
)
def test_what_is_written_to_a_part_is_written_to_the_weight(model, take):
    weight, other = (int8fx.quantize_(m).up.weight for m in (model, Model()))
    expected = weight.dequantize()
    take(expected).copy_(take(other.dequantize()))
    take(weight).copy_(take(other))
    assert torch.equal(weight.dequantize(), expected)


def test_columns_take_values_of_the_same_scales_only(model):
    weight, other = (int8fx.quantize_(m).up.weight for m in (model, Model()))
    before = weight.clone()
    message = r"columns 3 to 9 of an int8 weight of 96 rows cannot take values with other scales"
    with pytest.raises(RuntimeError, match=message):
        weight[:, 3:9].copy_(other[:, 3:9])
    assert torch.equal(weight, before)
    empty = weight.new_zeros(N, K)
    empty[:, 3:9].copy_(other[:, 3:9])
    assert torch.equal(empty.dequantize()[:, 3:9], other.dequantize()[:, 3:9])
    weight[:, 3:9].copy_(weight[:, 13:19])
    assert torch.equal(weight.w_int8[:, 3:9], before.w_int8[:, 13:19])


def test_a_part_of_a_part_is_written_to_with_all_that_it_is_a_part_of_or_not_at_all(model):
    weight = int8fx.quantize_(model).up.weight
    columns = weight[:, :16]
    before = weight.clone(), columns.clone()
    with pytest.raises(RuntimeError, match="cannot take values with other scales"):
        columns[:4].copy_(torch.full((4, 16), 7.0))
    assert torch.equal(weight, before[0]) and torch.equal(columns, before[1])


def test_a_row_is_a_float_copy_to_read(model):
    weight = int8fx.quantize_(model).up.weight
    before = weight.clone()
    row = weight[3]
    assert torch.equal(row, before.dequantize()[3]) and type(row.clone()) is torch.Tensor
    with pytest.raises(RuntimeError, match="read-only"):
        row.zero_()
    assert torch.equal(weight, before)


def test_zeros_of_another_shape_are_no_int8_weight(model):
    weight = int8fx.quantize_(model).up.weight
    assert type(weight.new_zeros(N, 8)) is torch.Tensor


def test_a_part_does_not_keep_the_weight(model):
    weight = weight_of(model.up)
    # Autograd keeps what a view is a view of; what writes to it does not.
    part, packed = weight[3:9].part_of, weakref.ref(weight.packed)
    values = weight.w_int8[3:9], weight.w_scale[3:9].clone()
    del weight
    assert packed() is None
    part.write(*values)


def test_setting_a_part_is_refused(model):
    weight = int8fx.quantize_(model).up.weight
    with pytest.raises(RuntimeError, match=r"read-only, no part of it can be set: int8fx.dequantize_"):
        weight[3] = 0.0


def test_torch_load_reads_it_with_weights_only(model, tmp_path):
    weight = int8fx.quantize_(model).up.weight
    torch.save({"weight": weight}, tmp_path / "file.pt")
    read = torch.load(tmp_path / "file.pt", weights_only=True)["weight"]
    assert type(read) is Int8Weight and torch.equal(read, weight)


@pytest.mark.parametrize("write", ["zero_", "normal_", "relu_"])
def test_writing_to_it_is_refused(model, write):
    weight = int8fx.quantize_(model).up.weight
    message = r"would write to an int8 weight of shape \[96, 64\].*int8fx.dequantize_\(model\)"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        getattr(weight, write)()


def test_requiring_grad_is_refused(model):
    int8fx.quantize_(model)
    with pytest.raises(RuntimeError, match=r"cannot require grad: train an adapter.*dequantize_"):
        model.requires_grad_(True)


def test_copying_into_it(model):
    weight, other = (int8fx.quantize_(m).up.weight for m in (model, Model()))
    weight.copy_(other)
    assert torch.equal(weight, other)
    floats = torch.randn(N, K)
    weight.copy_(floats)
    assert torch.equal(weight.w_int8, quantize_weight(floats)[0])
    assert torch.equal(torch.empty(N, K).copy_(weight), weight.dequantize())
    with pytest.raises(RuntimeError, match=r"shape \[96, 64\] cannot take.*shape \[64, 96\]"):
        weight.copy_(floats.t())
    with pytest.raises(RuntimeError, match=r"tensor of torch.int8 without scales"):
        weight.copy_(floats.to(torch.int8))
    with pytest.raises(RuntimeError, match="values of a transposed one"):
        weight.copy_(weight_of(nn.Linear(N, K)).t())


def test_gradients_of_the_input_are_straight_through(model, x):
    linear = int8fx.quantize_(model).up
    x.requires_grad_(True)
    linear(x).pow(2).sum().backward()
    y = linear(x).detach().double()
    expected = 2 * y @ linear.weight.dequantize(torch.float64)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


# --- other compilers -----------------------------------------------------------------------------


def test_another_backend_compiles_it_to_the_same_operators(model, x):
    int8fx.quantize_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_export(model, x):
    int8fx.quantize_(model)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes}
    assert any(target.startswith("int8fx.") for target in targets)


def test_a_part_of_an_int8_weight_is_left_to_the_operators(model, x):
    class Half(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return nn.functional.linear(x, self.linear.weight[: N // 2])

    half = Half(int8fx.quantize_(model).up)
    y, report = compile_once(half, x)
    (decision,) = report.decisions
    assert decision.reason.startswith("an int8 weight cannot be seen through .getitem(slice")
    assert torch.equal(y, half(x))


def test_a_transposed_use_is_left_to_the_operators(model):
    weight = int8fx.quantize_(model).up.weight
    reason = weight_reason(weight, WeightExpression(None, (TRANSPOSE,)), PER_CHANNEL)
    assert reason == "an int8 weight cannot be seen through .transpose(0, 1)"
    assert weight_reason(weight, WeightExpression(None, (TRANSPOSE, TRANSPOSE)), PER_CHANNEL) == ""


def test_a_scheme_with_another_format_leaves_it_to_the_operators(model, x):
    linear = int8fx.quantize_(model).up
    y, report = compile_once(linear, x, backend_options={"scheme": "absmax-tensor"})
    (decision,) = report.decisions
    assert decision.reason == (
        "the weight is int8 per channel already, and the scheme wants it int8 per tensor"
    )
    assert torch.equal(y, linear(x))
    y, report = compile_once(linear, x, backend_options={"scheme": "absmax-vector"})
    assert report.accepted


def test_where_no_operator_quantises_by_itself_two_do(model, x, monkeypatch):
    linear = int8fx.quantize_(model).up
    expected = linear(x)
    monkeypatch.setattr(table, "joined", lambda device: None)
    torch.testing.assert_close(linear(x), expected)


def test_pack_on_meta_is_the_plain_form():
    assert pack_codes(torch.empty(N, K, dtype=torch.int8, device="meta")).shape == (N, K)


class Router(nn.Module):
    """As transformers names what chooses experts, with a layer that does not end in scores."""

    def __init__(self):
        super().__init__()
        self.hidden, self.layer = nn.Linear(K, K), nn.Linear(K, 4)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.shared, self.wide = nn.Linear(K, 4), nn.Linear(K, 8), Router()
        self.experts = nn.ModuleList(nn.Linear(K, N) for _ in range(4))


def test_routers_stay_in_float_as_in_the_backend():
    reasons = {d.path: d.reason for d in int8fx.decisions(Experts())}
    assert {path for path, reason in reasons.items() if reason} == {"gate", "wide.layer"}
    assert reasons["gate"] == "skip: a router (gate of Experts)"
    assert reasons["wide.layer"] == "skip: a router (layer of Router)"
    assert not any(d.reason for d in int8fx.decisions(Experts(), skip=[]))
    # Without experts beside it, a gate is a linear like others.
    assert not any(d.reason for d in int8fx.decisions(nn.ModuleDict({"gate": nn.Linear(K, 4)})))


def test_a_router_of_transformers_quantised_compiles_to_what_its_float_model_compiles_to():
    from transformers.models.afmoe.configuration_afmoe import AfmoeConfig
    from transformers.models.afmoe.modeling_afmoe import AfmoeMLP, AfmoeTokenChoiceRouter

    class Block(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.router, self.shared = AfmoeTokenChoiceRouter(config), AfmoeMLP(config)
            self.register_buffer("bias", torch.zeros(config.num_experts))

        def forward(self, x):
            return (*self.router(x, self.bias), self.shared(x))

    torch.manual_seed(0)
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": K, "intermediate_size": N}
    block = Block(AfmoeConfig(**sizes)).requires_grad_(False)
    x = torch.randn(2, 5, K)
    expected, of_float = compile_once(block, x)
    int8fx.quantize_(block)
    assert type(block.router.gate.weight) is nn.Parameter
    found, report = compile_once(block, x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert [d.path for d in report.accepted] == [d.path for d in of_float.accepted]
    (router,) = [d for d in of_float.decisions if not d.accepted]
    assert router.path == "router.gate" and "ranked by topk" in router.reason


class Mixture(nn.Module):
    """Experts in two batches of matrices, their router, and what is three-dimensional beside them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(K, 4, bias=False), nn.ParameterDict()
        self.experts["up"] = nn.Parameter(torch.randn(4, N, K))
        self.experts["down"] = nn.Parameter(torch.randn(4, K, N))
        self.positions = nn.Parameter(torch.randn(2, 64, K))
        self.convolution = nn.Conv1d(K, K, 16)
        self.out = nn.Linear(K, K, bias=False)


def warnings_of(model, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        int8fx.quantize_(model, **options)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_experts_that_stay_in_float_are_named_once():
    (message,) = warnings_of(nn.ModuleList(Mixture() for _ in range(2)))
    count = 2 * 2 * 4 * N * K
    assert message.startswith(f"quantize_ leaves {count:,} parameters in float, ")
    assert "of ModuleList: experts, in *.experts.down, *.experts.up." in message
    assert 'torch.compile(model, backend="llmint8")' in message


@pytest.mark.parametrize("options", [{"only": ["*out"]}, {"skip": ["*experts*"]}])
def test_experts_that_nobody_asked_for_are_no_warning(options):
    assert warnings_of(Mixture(), **options) == []
    assert warnings_of(Model()) == []


def test_decisions_have_experts():
    found = {d.path: d for d in int8fx.decisions(Mixture()) if d.experts}
    assert {path: (d.experts, d.shape, d.accepted) for path, d in found.items()} == {
        "experts.up": (4, (N, K), False),
        "experts.down": (4, (K, N), False),
    }
    assert {d.reason for d in found.values()} == {
        "experts in one batch of matrices: the backend quantises them when it compiles the model"
    }


def test_the_warning_says_what_share_of_a_model_its_experts_are():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "vocab_size": 64}
    counts = {"num_hidden_layers": 2, "num_experts": 16, "num_attention_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **counts, num_key_value_heads=2, head_dim=32))
    (message,) = warnings_of(model)
    left = [p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in left) / total
    assert f", {share:.0%} of Qwen3MoeForCausalLM" in message and share > 0.9
    assert "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj" in message
    assert type(model.model.layers[1].self_attn.q_proj.weight) is Int8Weight


def test_a_router_is_known_by_how_many_experts_are_near():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 6
            self.choose, self.other = nn.Linear(K, 6), nn.Linear(K, 5)
            self.inner = nn.ModuleDict({"score": nn.Linear(K, 6), "wide": nn.Linear(K, K)})

    class Indexer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.heads = nn.Linear(K, N), nn.ModuleDict({"weights": nn.Linear(K, 4)})

    model = nn.ModuleDict({"block": Block(), "mixture": Mixture(), "indexer": Indexer()})
    reasons = {d.path: d.reason for d in int8fx.decisions(model) if not d.experts}
    assert reasons == {
        "block.choose": "skip: a router (choose of Block)",
        "block.other": "",
        "block.inner.score": "skip: a router (score of ModuleDict)",
        "block.inner.wide": "",
        "mixture.router": "skip: a router (router of Mixture)",
        "mixture.out": "",
        "indexer.q": "skip: its output is ranked (q of Indexer)",
        "indexer.heads.weights": "skip: its output is ranked (weights of Indexer)",
    }
    assert not any(d.reason for d in int8fx.decisions(model, skip=[]) if not d.experts)
