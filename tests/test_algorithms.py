"""GPTQ, AWQ and HQQ: each against its formula, and on a model that is trained here."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8fx
from int8fx import Int8Weight
from int8fx.kernels.formats.clip import quantize_groups
from int8fx.kernels.formats.grouped import WHOLE, dequantize_codes
from int8fx.kernels.ops.rotation import rotate
from int8fx.testing.support import Mlp, compile_once
from int8fx.weights.algorithms.awq import awq
from int8fx.weights.algorithms.basis import Basis
from int8fx.weights.algorithms.gptq import gptq
from int8fx.weights.algorithms.grid import Codes, Grid
from int8fx.weights.algorithms.hqq import hqq, shrink
from int8fx.weights.algorithms.moments import in_parts, second_moments

N, K = 24, 96
DATA = Path(int8fx.__file__).parent / "data" / "emma.txt"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(rows: int = 400, K: int = K) -> Tensor:
    """Of columns that are not alike, and not independent."""
    x = numbers(rows, K, seed=3) @ (torch.eye(K) + 2 * numbers(K, K, seed=4) / K**0.5)
    x = x * torch.logspace(-1, 0.5, K)[torch.randperm(K, generator=torch.Generator().manual_seed(5))]
    return x.t() @ x / rows


def grid(bits=4, group=32, zeros="integer", act_order=False) -> Grid:
    return Grid(bits, group, zeros, act_order, torch.float32)


def values(found: Codes, form: Grid) -> Tensor:
    """What codes stand for, in the order of the weight."""
    width = form.width(K)
    codes = F.pad(found.codes, (0, -K % width))
    w_hat = dequantize_codes(codes, form.bits, form.group, form.zeros, found.parts, K)
    if found.order is not None:
        w_hat = torch.empty_like(w_hat).index_copy(1, found.order.long(), w_hat)
    return w_hat if found.column_scale is None else w_hat * found.column_scale


def nearest(weight: Tensor, form: Grid) -> Tensor:
    codes, *parts = quantize_groups(weight, form.bits, form.group, form.zeros, form.dtype)
    return dequantize_codes(codes, form.bits, form.group, form.zeros, parts, K)


def loss(w_hat: Tensor, weight: Tensor, H: Tensor) -> float:
    """The mean square of the output's error, times rows."""
    error = (w_hat - weight).double()
    return float((error @ H.double() * error).sum())


# --- GPTQ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zeros", ["middle", "integer", "float", "offset"])
@pytest.mark.parametrize("group", [16, 32, 40, WHOLE])
def test_gptq_loses_less_of_the_output_than_rounding(group, zeros, act_order):
    weight, H, form = numbers(N, K), moment(), grid(group=group, zeros=zeros, act_order=act_order)
    found = gptq(weight, H, form)
    assert found.codes.max() <= 15
    assert loss(values(found, form), weight, H) < 0.75 * loss(nearest(weight, form), weight, H)


def by_definition(weight: Tensor, H: Tensor, form: Grid) -> Tensor:
    """OBQ's update in float64, one column after another: what is left is solved for anew each time."""
    w, H = weight.double().clone(), H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(K)
    w_hat = torch.empty_like(w)
    for k in range(K):
        if k % form.group == 0:
            _, *parts = quantize_groups(
                w[:, k : k + form.group].float(), form.bits, form.group, form.zeros, form.dtype
            )
            scale, zero = (part.double()[:, 0] for part in parts)
        code = (w[:, k] / scale + zero).round().clamp(0, 15)
        w_hat[:, k] = (code - zero) * scale
        error = w[:, k] - w_hat[:, k]
        inverse = torch.linalg.inv(H[k:, k:])
        w[:, k:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return w_hat


def test_gptq_is_its_definition():
    """Beyond a block of 128 columns it would be the same: here errors pass several groups."""
    weight, H, form = numbers(6, K), moment(), grid()
    w_hat, expected = values(gptq(weight, H, form), form).double(), by_definition(weight, H, form)
    # A tie that fp32 rounds to the other side changes what follows in that row.
    rows = ((w_hat - expected).abs().amax(1) < 1e-4).sum()
    assert rows >= 5


def test_gptq_over_several_blocks_of_columns(monkeypatch):
    """Errors of a block reach the columns behind it as they would one by one."""
    from int8fx.weights.algorithms import gptq as module

    weight, H, form = numbers(6, K), moment(), grid()
    whole = gptq(weight, H, form)
    monkeypatch.setattr(module, "COLUMNS_AT_ONCE", 20)
    parts = gptq(weight, H, form)
    same = (whole.codes == parts.codes).float().mean()
    assert same > 0.95 and not torch.equal(whole.codes, torch.zeros_like(whole.codes))
    assert abs(loss(values(parts, form), weight, H) / loss(values(whole, form), weight, H) - 1) < 0.05


def test_gptq_takes_the_largest_columns_first():
    H = moment()
    found = gptq(numbers(N, K), H, grid(act_order=True))
    assert (H.diagonal()[found.order.long()].diff() <= 0).all()


def test_columns_that_no_row_has_are_rounded():
    weight, H = numbers(N, K), moment()
    H[:, 5], H[5, :] = 0, 0
    w_hat = values(gptq(weight, H, grid()), grid())
    assert w_hat.isfinite().all() and (w_hat[:, 5] - weight[:, 5]).abs().max() < 1
    nothing = values(gptq(weight, torch.zeros(K, K), grid()), grid())
    assert (nothing - weight).norm() < 0.1 * weight.norm()


# --- AWQ ------------------------------------------------------------------------------------------


def test_awq_loses_less_of_the_output_than_rounding():
    weight, H, form = numbers(N, K), moment(), grid()
    found = awq(weight, H, form)
    assert loss(values(found, form), weight, H) < 0.9 * loss(nearest(weight, form), weight, H)
    assert found.column_scale.unique().numel() > 1
    # Larger activations make larger weights.
    assert torch.corrcoef(torch.stack([H.diagonal().log(), found.column_scale.log()]))[0, 1] < -0.9


def test_awq_of_columns_that_are_alike_is_rounding():
    weight, form = numbers(N, K), grid()
    found = awq(weight, torch.eye(K), form)
    assert torch.equal(found.column_scale, torch.ones(K))
    assert torch.equal(values(found, form), nearest(weight, form))


# --- HQQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_has_a_smaller_norm_of_the_error(bits):
    """Of p = 0.7, which is what it minimises; from the grid of each group's range."""
    weight, form = numbers(N, K), grid(bits=bits, zeros="float")
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / (2**bits - 1)
    codes = (groups / scale.unsqueeze(-1) - (low / scale).unsqueeze(-1)).round().to(torch.uint8)
    start = dequantize_codes(codes.flatten(1), bits, 32, "float", [scale, -low / scale], K)
    w_hat = values(hqq(weight, form), form)
    assert (w_hat - weight).abs().pow(0.7).sum() < (start - weight).abs().pow(0.7).sum()


@pytest.mark.parametrize("value", [0.5, -3.0, 5.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hqq_of_groups_of_one_value(dtype, value):
    """Their zero point is far from every code: it must not be infinite."""
    linear = nn.Linear(64, 8, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight[:, :32] = value
    linear.weight[1, 3] += 1e-3 * value
    weight = linear.weight.double()
    model = int8fx.quantize_(nn.Sequential(linear), scheme="w4a16-group", method="hqq")
    error = (model[0].weight.dequantize().double() - weight)[:, :32].abs()
    assert error.max() <= max(torch.finfo(dtype).eps, 2.0**-14) * abs(value)


def test_the_proximal_step_keeps_what_is_large():
    errors = torch.tensor([0.0, 0.01, -0.01, 5.0, -5.0])
    shrunk = shrink(errors, 10.0)
    assert shrunk[:3].tolist() == [0, 0, 0]
    expected = 5 - 5**-0.3 / 10
    torch.testing.assert_close(shrunk[3:], torch.tensor([expected, -expected]))


# --- what linears read ----------------------------------------------------------------------------


def test_moments_are_means_over_all_rows():
    model = Mlp(K, 32).requires_grad_(False)
    basis = Basis(int8fx.SCHEMES["w4a16-group"].choice())
    rotated = Basis(int8fx.SCHEMES["w4a8-group"].choice(columns=(3,)))
    x = [numbers(2, 5, K), numbers(7, K, seed=1), numbers(0, K)]
    calls = [((each,), {}) for each in x]
    moments = second_moments(model, calls, {model.up: basis})
    rows = torch.cat([each.reshape(-1, K) for each in x])
    torch.testing.assert_close(moments[model.up].mean, rows.t() @ rows / 17)
    moments = second_moments(model, calls, {model.up: rotated})
    rows = rotate(rows.index_fill(1, torch.tensor([3]), 0), 64, "hadamard")
    torch.testing.assert_close(moments[model.up].mean, rows.t() @ rows / 17, rtol=1e-4, atol=1e-5)
    assert not model.up._forward_pre_hooks


def test_as_many_linears_at_once_as_memory_allows():
    size = 4 * 100**2
    assert list(in_parts([100] * 5, 2 * size)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(in_parts([100, 300, 100], size)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(in_parts([])) == []


# --- a model that is trained ----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        heads = [
            linear(self.norms[0](x)).unflatten(-1, (4, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        ]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Letters(nn.Module):
    """A language model of two layers."""

    def __init__(self, vocabulary: int, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class Trained:
    """The model, batches to calibrate by, and others to judge by."""

    def __init__(self, steps: int = 200) -> None:
        text = DATA.read_text().lower()
        letters = sorted(set(text))
        self.ids = torch.tensor([letters.index(letter) for letter in text])
        torch.manual_seed(0)
        self.model = Letters(len(letters))
        optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        for step in range(steps):
            batch = self.batch(16, step, 65)
            logits = self.model(batch[:, :-1])
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
        self.model.requires_grad_(False).eval()
        self.calibration = [self.batch(16, 10**5 + i) for i in range(4)]
        self.judged = self.batch(32, 10**6)
        self.expected = self.model(self.judged).log_softmax(-1)

    def batch(self, count: int, seed: int, length: int = 64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.ids) - length, (count,), generator=generator)
        return torch.stack([self.ids[start : start + length] for start in starts])

    def quantized(self, method: str, **options) -> nn.Module:
        batches = {"batches": self.calibration} if method in ("gptq", "awq") else {}
        model = copy.deepcopy(self.model)
        return int8fx.quantize_(model, method=method, **batches, **options)

    def mean_kl(self, method: str, **options) -> float:
        found = self.quantized(method, **options)(self.judged).log_softmax(-1)
        return float((self.expected.exp() * (self.expected - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_papers_ordering(trained, bits):
    """GPTQ and AWQ better than round-to-nearest, and HQQ, which sees no data, between."""
    options = {"scheme": "wna16-group", "bits": bits, "group_size": 64}
    kl = {method: trained.mean_kl(method, **options) for method in ("gptq", "awq", "rtn")}
    kl["hqq"] = trained.mean_kl("hqq", **options, zeros="float")
    assert kl["gptq"] < 0.75 * kl["rtn"] and kl["awq"] < kl["rtn"]
    assert kl["gptq"] < kl["hqq"] < kl["rtn"]


def test_gptq_of_rotated_weights_beside_columns_in_16_bit(trained):
    calibration = int8fx.calibrate(trained.model, trained.calibration)
    options = {"scheme": "w4a8-group", "group_size": 32, "calibration": calibration, "columns": 4}
    nearest, better = (trained.mean_kl(method, **options) for method in ("rtn", "gptq"))
    assert better < 0.8 * nearest
    assert nearest < trained.mean_kl("rtn", scheme="w4a8-group", group_size=32)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {"scheme": "w4a16-group", "act_order": True, "group_size": 16}),
        ("gptq", {"scheme": "w4a8-group", "zeros": "middle", "group_size": -1}),
        ("awq", {"scheme": "w4a16-group"}),
        ("hqq", {"scheme": "w4a8-group", "rotation": "none"}),
    ],
    ids=["gptq act-order", "gptq per channel", "awq", "hqq"],
)
def test_what_they_make_goes_through_what_a_weight_goes_through(trained, method, options, tmp_path):
    model = trained.quantized(method, **options)
    assert type(model.blocks[0].up.weight) is Int8Weight
    kept = model.blocks[0].up.weight.options
    other = int8fx.quantize_(copy.deepcopy(trained.model), **kept)
    int8fx.save_checkpoint(model, tmp_path)
    int8fx.load_checkpoint(other, tmp_path)
    x = numbers(5, 64)
    block = model.blocks[0]
    assert torch.equal(other.blocks[0].up(x), block.up(x))
    floats = F.linear(x, block.up.weight.dequantize(), block.up.bias)
    assert (block.up(x) - floats).norm() < 0.02 * floats.norm()
    y, report = compile_once(block.up, x)
    assert [decision.scheme for decision in report.decisions] == [options["scheme"]]
    torch.testing.assert_close(y, block.up(x))


def test_layers_see_what_those_before_them_became(trained, monkeypatch):
    """With memory for one linear at a time, each reads what is quantised already; and it is told."""
    from int8fx.weights.algorithms import apply

    at_once = trained.mean_kl("gptq", scheme="wna16-group", bits=2)
    monkeypatch.setattr(apply, "in_parts", lambda sizes: in_parts(sizes, 1))
    seen: list[tuple[int, int]] = []
    told = {"on_weight": lambda *done: seen.append(done)}
    one_by_one = trained.mean_kl("gptq", scheme="wna16-group", bits=2, **told)
    assert seen == [(index, 12) for index in range(1, 13)]
    assert one_by_one < at_once


def test_a_linear_that_no_row_reached_is_named_and_rounded():
    class Half(Mlp):
        def forward(self, x):
            return self.up(x)

    model = Half(K, 64).requires_grad_(False)
    with pytest.warns(UserWarning, match="no row of the batches reached down"):
        int8fx.quantize_(model, scheme="w4a16-group", method="gptq", batches=[numbers(9, K)])
    assert type(model.down.weight) is Int8Weight


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "obq"}, ["method='obq'", "'rtn', 'hqq', 'gptq', 'awq'"]),
        ({"method": "gptq"}, ["method='gptq' needs batches"]),
        ({"method": "gptq", "batches": []}, ["was given no batch"]),
        ({"method": "hqq", "batches": [1]}, ["method='hqq' reads no batches"]),
        ({"batches": [1]}, ["method='rtn' reads no batches"]),
        ({"method": "hqq", "zeros": "integer"}, ["does not serve up", "zeros='float'"]),
        (
            {"method": "gptq", "scheme": "llm.int8", "batches": [1]},
            ["does not serve up", "'llm.int8' has no groups along K"],
        ),
        ({"method": "awq", "scheme": "w4a8-group", "batches": [1]}, ["'column_scale'", "'w4a8-group'"]),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(given, words):
    model = Mlp(K, 64).requires_grad_(False)
    with pytest.raises(ValueError, match="quantize_") as raised:
        int8fx.quantize_(model, **{"scheme": "w4a16-group", **given})
    assert [word for word in words if word not in str(raised.value)] == []
    assert type(model.up.weight) is nn.Parameter
    with pytest.raises(TypeError, match="batches is a Tensor"):
        int8fx.quantize_(model, scheme="w4a16-group", method="gptq", batches=numbers(3, K))
    assert type(model.up.weight) is nn.Parameter
