"""join_grouped: which linears of 4-bit weights become one call, and that results are the same."""

import pytest
import torch
from torch import Tensor, nn

import int8fx
from int8fx.kernels.schemes.scheme import eagerly
from int8fx.passes.int8.join_grouped import ALONE
from int8fx.testing.support import compile_once

each_scheme = pytest.mark.parametrize("name", ["w4a16-group", "w4a8-group"])


def rows(M: int, K: int) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1)) + 0.3


class Branches(nn.Module):
    """Linears of one input; those named in ``biased`` have a bias."""

    def __init__(self, count: int, biased: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(96, 32, bias=i in biased) for i in range(count))
        self.requires_grad_(False)

    def forward(self, x):
        return [linear(x) for linear in self.linears]


@each_scheme
@pytest.mark.parametrize("zeros", ["middle", "integer"])
@pytest.mark.parametrize(
    ("count", "biased", "calls", "alone"),
    [(3, (), 1, 0), (3, (0, 1, 2), 1, 0), (3, (1,), 1, 1), (1, (), 0, 1)],
    ids=["three", "all biased", "one biased", "one"],
)
def test_linears_of_one_input_are_one_call(name, zeros, count, biased, calls, alone):
    model, x = Branches(count, biased), rows(5, 96)
    y, report = compile_once(model, x, backend_options={"scheme": name, "zeros": zeros})
    (outcome,) = [each for each in report.passes if each.name == "join_grouped"]
    assert (outcome.changed, dict(outcome.refused)) == (calls, {ALONE: alone} if alone else {})
    assert report.graph.count("_linears.default(") == calls
    choice = int8fx.SCHEMES[name].choice(zeros=zeros)
    for each, linear in zip(y, model.linears, strict=True):
        packed = choice.quantize(linear.weight)
        assert torch.equal(each, choice.lower(eagerly, x, packed, linear.bias))


def test_columns_of_a_calibration_are_each_weights_own():
    """Two linears of one input that keep other columns are one call, and two rotations in it."""
    model, x = Branches(2), rows(5, 96)
    calibration = int8fx.calibrate(model, [x])
    options = {"scheme": "w4a8-group", "calibration": calibration, "columns": 4}
    y, report = compile_once(model, x, backend_options=options)
    assert report.graph.count("grouped_linears.default(") == 1
    for each, linear in zip(y, model.linears, strict=True):
        path = f"linears.{list(model.linears).index(linear)}"
        columns = calibration.columns_of(path, (32, 96), 4)
        choice = int8fx.SCHEMES["w4a8-group"].choice(columns=columns)
        assert torch.equal(each, choice.lower(eagerly, x, choice.quantize(linear.weight), None))


@each_scheme
def test_gradients_of_joined_linears(name):
    model, x = Branches(2, (0, 1)), rows(5, 96).requires_grad_()
    for linear in model.linears:
        linear.bias.requires_grad_()
    compiled = torch.compile(model, backend="llmint8", options={"scheme": name})
    sum(compiled(x)).sum().backward()
    choice = int8fx.SCHEMES[name].choice()
    kept = choice.weight_format
    w_hat = [kept.dequantize(kept.quantize(each.weight), 32, 96) for each in model.linears]
    torch.testing.assert_close(x.grad, torch.ones(5, 32) @ sum(w_hat), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(linear.bias.grad, torch.full((32,), 5.0)) for linear in model.linears)
