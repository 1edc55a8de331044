"""Calibrations: what one run shows, the file, and what takes it."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import int8fx
from int8fx import Calibration
from int8fx.errors import CalibrationError
from int8fx.testing.support import Mlp, compile_once

K, N = 64, 96
SCHEME = {"scheme": "int8-rotated"}


def model_of(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(K, N).requires_grad_(False)


def batch(rows: int = 5, seed: int = 1) -> Tensor:
    """Column 7 is large, column 40 larger, in every row."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= 20
    x[:, 40] -= 200
    return x


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def calibration(model):
    return int8fx.calibrate(model, [batch()])


# --- what it finds --------------------------------------------------------------------------------


def test_columns_are_those_of_the_largest_inputs(model):
    batches = [batch(3), batch(4, seed=2)]
    found = int8fx.calibrate(model, batches)
    assert [(linear.path, linear.shape) for linear in found.linears] == [
        ("up", (N, K)),
        ("down", (K, N)),
    ]
    assert found.model == "Mlp" and found.rows == 7
    x = torch.cat(batches)
    for linear, given in zip(found.linears, (x, torch.relu(model.up(x))), strict=True):
        values, columns = given.abs().amax(0).sort(descending=True, stable=True)
        assert linear.columns == tuple(columns[:64].tolist())
        torch.testing.assert_close(torch.tensor(linear.absmax), values[:64])
    assert found.linears[0].columns[:2] == (40, 7)


@pytest.mark.parametrize("given", ["tensor", "tuple", "dict"])
def test_batches_are_what_the_model_is_called_with(model, given):
    x = batch()
    batches = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[given]
    done: list[int] = []
    found = int8fx.calibrate(model, iter([batches, batches]), on_batch=done.append)
    assert found.linears[0].columns[0] == 40 and done == [1, 2]


def test_the_model_stays_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    int8fx.calibrate(model, [batch()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert type(model.up.weight) is nn.Parameter


def test_a_compiled_model_and_a_quantised_one(model, calibration):
    compiled = torch.compile(model, backend="llmint8")
    assert int8fx.calibrate(compiled, [batch()]) == calibration
    quantized = int8fx.quantize_(model, **SCHEME)
    assert int8fx.calibrate(quantized, [batch()]).linears[0] == calibration.linears[0]


def test_a_linear_that_did_not_run_has_no_columns_and_is_quantised_without(model):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(K, N), nn.Linear(K, N)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() < 0, self.used, self.other, (x,))

    branches = Branches()
    found = {linear.path: linear for linear in int8fx.calibrate(branches, [batch()]).linears}
    assert found["used"].columns[0] == 40 and found["other"].columns == ()


def test_rows_without_numbers_count_for_nothing(model):
    x = batch()
    x[0, 3] = float("nan")
    assert int8fx.calibrate(model, [x]).linears[0].columns[:2] == (40, 7)
    assert int8fx.calibrate(model, [batch(), batch(0)]).linears[0].columns[:2] == (40, 7)


def test_experts():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, N, K), requires_grad=False)

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x.bfloat16(), self.weight.bfloat16().mT, ends)

    x, ends = batch(32), torch.tensor([16, 16, 32], dtype=torch.int32)
    (linear,) = int8fx.calibrate(Experts(), [(x, ends)]).linears
    assert linear.shape == (N, K) and linear.columns[:2] == (40, 7)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (torch.zeros(2, K), TypeError, "batches is a Tensor"),
        ({"x": torch.zeros(2, K)}, TypeError, "batches is a dict"),
        ([], CalibrationError, "no batch"),
    ],
)
def test_bad_batches_are_named(model, batches, error, words):
    with pytest.raises(error, match=words):
        int8fx.calibrate(model, batches)


def test_a_model_without_linears_is_named():
    with pytest.raises(CalibrationError, match="no linear in ReLU"):
        int8fx.calibrate(nn.ReLU(), [batch()])


# --- the file -------------------------------------------------------------------------------------


def test_the_file_goes_there_and_back(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration == Calibration.load(str(path))
    assert path.stat().st_size < 4000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format="other"), "no calibration: its 'format'"),
        (lambda content: content.update(version=2), "version 2; allowed: 1"),
        (lambda content: content.pop("linears"), "damaged"),
        (lambda content: content["linears"][0].update(columns=[1, 1]), "damaged"),
        (lambda content: content["linears"][0].update(columns=[64], absmax=[1.0]), "not among 64"),
        (lambda content: content["linears"][0].update(columns=[0.5], absmax=[1.0]), "whole numbers"),
        (lambda content: content["linears"][0].update(absmax=[]), "damaged"),
    ],
)
def test_a_damaged_file_is_named(calibration, tmp_path, change, words):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=words) as raised:
        int8fx.quantize_(model_of(), **SCHEME, calibration=path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_what_is_no_file_of_ours_is_named(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"calibration\.json: no calibration"):
        Calibration.load(path)


# --- what takes it --------------------------------------------------------------------------------


def error_of(model: nn.Module, x: Tensor, **options) -> float:
    y, _ = compile_once(model, x, backend_options={**SCHEME, **options})
    return ((y - model(x)).norm() / model(x).norm()).item()


def test_the_columns_of_a_calibration_lower_the_error(model, calibration):
    x = batch(seed=5)  # other rows
    # Both linears' rounding is in it, and the second has no such columns.
    assert error_of(model, x, calibration=calibration) < 0.6 * error_of(model, x)
    assert error_of(model, x, calibration=calibration, columns=0) == error_of(model, x)


def test_how_many_columns_is_asked_of_it(model, calibration):
    quantized = int8fx.quantize_(model, **SCHEME, calibration=calibration, columns=2)
    assert quantized.up.weight.options["columns"] == (7, 40)
    assert (
        len(
            int8fx.quantize_(model_of(), **SCHEME, calibration=calibration).up.weight.options["columns"]
        )
        == 8
    )


def test_rules_have_numbers_of_columns_and_columns_of_their_own(model, calibration):
    rules = [("up", "int8-rotated", {"columns": 1}), ("down", "int8-rotated", {"columns": [3, 5]})]
    _, report = compile_once(
        model, batch(), backend_options={"calibration": calibration, "rules": rules}
    )
    assert [decision.scheme for decision in report.decisions] == ["int8-rotated"] * 2
    explained = int8fx.explain(model, batch(), options={"calibration": calibration, "rules": rules})
    assert [row.static_columns for row in explained.rows] == [(40,), (3, 5)]


def test_a_calibration_without_columns_to_keep_is_an_error(calibration):
    with pytest.raises(ValueError, match=r"'calibration' of quantize_: llm\.int8 keeps no columns"):
        int8fx.quantize_(model_of(), calibration=calibration)
    with pytest.raises(ValueError, match=r"columns=\(3,\) with decomposition='column'"):
        int8fx.Options.parse({"columns": [3]})


def test_columns_without_a_calibration_need_their_numbers(model):
    with pytest.raises(
        ValueError, match=r"'columns' of backend 'llmint8'.*without the option 'calibration'"
    ):
        int8fx.Options.parse({**SCHEME, "columns": 8})
    with pytest.raises(ValueError, match="columns=8 needs a calibration"):
        int8fx.SCHEMES["int8-rotated"].choice(columns=8).quantize(model.up.weight)
    assert error_of(model.up, batch(), columns=[7, 40]) < 0.5 * error_of(model.up, batch())


def test_of_another_model_is_an_error_that_names_what_differs(calibration):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(K, N + 1).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    class Third(Other):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.up
            del self.up

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    options = {**SCHEME, "calibration": calibration}
    shapes = r"up: N=97, K=64 in the model, N=96, K=64 in the calibration, which is of a Mlp"
    names = r"first: a linear of the model that is not in the calibration.*2 linears \(up, down\)"
    for other, words in ((Other(), shapes), (Third(), names)):
        before = dict(other.named_parameters())
        with pytest.raises(CalibrationError, match=words):
            int8fx.quantize_(other, **options)
        assert all(parameter is before[name] for name, parameter in other.named_parameters())
        with pytest.raises(Exception, match=words):
            compile_once(other, batch(), backend_options=options)


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(N, K), nn.Linear(K, K)
        self.lm_head = nn.Linear(K, N, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.up(self.embed(tokens)))


@pytest.mark.parametrize("tied", [True, False])
def test_with_a_calibration_the_output_head_is_quantised_too(tied):
    model, tokens = Tied(tied), torch.arange(12).view(3, 4)
    options = {**SCHEME, "calibration": int8fx.calibrate(model, [tokens])}
    y, report = compile_once(model, tokens, backend_options=options)
    assert {d.path: d.scheme for d in report.decisions} == {
        "up": "int8-rotated",
        "lm_head": "int8-rotated",
    }
    assert (y - model(tokens)).norm() < 0.02 * model(tokens).norm()
    # Not where nobody asked for it: without a calibration, by `skip`, or in another scheme.
    static = {**options, "scheme": "llm.int8", "decomposition": "static"}
    for others in (SCHEME, {**options, "skip": ["lm_head"]}, static):
        _, report = compile_once(model, tokens, backend_options=others)
        assert [d.path for d in report.decisions if not d.accepted] == ["lm_head"]


def test_what_is_ranked_stays_in_float_with_a_calibration():
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(K, K), nn.Linear(K, 4)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.up(x)).topk(2, dim=-1)[1]

    model = Router()
    options = {**SCHEME, "calibration": int8fx.calibrate(model, [batch()])}
    _, report = compile_once(model, batch(), backend_options=options)
    assert {d.path: d.reason for d in report.decisions} == {
        "up": "",
        "gate": "skip: a router (its output is ranked by topk)",
    }


def test_eager_compiled_and_loaded_are_one_arithmetic(model, calibration, tmp_path):
    x = batch(seed=3)
    y, _ = compile_once(model, x, backend_options={**SCHEME, "calibration": calibration})
    quantized = int8fx.quantize_(copy.deepcopy(model), **SCHEME, calibration=calibration)
    assert torch.equal(quantized(x), y)
    assert torch.equal(compile_once(quantized, x)[0], y)
    int8fx.save_checkpoint(quantized, tmp_path)
    with torch.device("meta"):
        empty = Mlp(K, N).requires_grad_(False)
    read = int8fx.load_checkpoint(int8fx.quantize_(empty, **SCHEME), tmp_path)
    assert torch.equal(read(x), y)
    assert read.up.weight.options == quantized.up.weight.options


def test_loading_takes_the_columns_of_the_file(model, calibration):
    quantized = int8fx.quantize_(copy.deepcopy(model), **SCHEME, calibration=calibration, columns=3)
    other = int8fx.quantize_(model_of(1), **SCHEME)
    parameter = other.up.weight
    other.load_state_dict(quantized.state_dict())
    assert other.up.weight is parameter and torch.equal(other(batch()), quantized(batch()))
    with pytest.raises(
        ValueError, match=r"blocks of 64.*in the checkpoint, .*blocks of 32.*in the model"
    ):
        int8fx.quantize_(model_of(), **SCHEME, block=32).load_state_dict(quantized.state_dict())


def test_blocks_that_share_a_graph_have_columns_of_their_own():
    blocks = nn.ModuleList(model_of(seed) for seed in range(3))
    expected = []
    for seed, block in enumerate(blocks):
        x = batch().roll(seed, 1)
        int8fx.quantize_(block, **SCHEME, calibration=int8fx.calibrate(block, [x]))
        expected.append((x, block(x)))
    assert len({block.up.weight.options["columns"] for block in blocks}) == 3
    torch._dynamo.reset()
    with torch.no_grad(), int8fx.collect_reports() as reports:
        for block, (x, y) in zip(blocks, expected, strict=True):
            block.compile(backend="llmint8")
            assert torch.equal(block(x), y)
    assert len(reports) == 1
