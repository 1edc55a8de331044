"""join_rotated: which rotated linears become one call, which do not, and that results are the same."""

import pytest
import torch
from torch import nn

from int8fx.passes.int8.join_rotated import ALONE
from int8fx.testing.support import compile_once

K = 96
OPTIONS = {"scheme": "int8-rotated"}


class Branches(nn.Module):
    """Linears of one input; those named in ``biased`` have a bias."""

    def __init__(self, count: int, biased: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(K, 32, bias=i in biased) for i in range(count))
        self.requires_grad_(False)

    def forward(self, x):
        return [linear(x) for linear in self.linears]


class Writes(Branches):
    """The second weight's input is written between the two linears."""

    def forward(self, x):
        x = x.clone()
        first = self.linears[0](x)
        x.mul_(2)
        return [first, self.linears[1](x)]


def joined(model, x):
    """The outputs, how many calls the pass made, and what it left."""
    y, report = compile_once(model, x, backend_options=OPTIONS)
    (outcome,) = [each for each in report.passes if each.name == "join_rotated"]
    assert report.graph.count("rotated_linears.default(") == outcome.changed
    return y, outcome.changed, dict(outcome.refused)


@pytest.mark.parametrize(
    ("model", "calls", "alone"),
    [
        (Branches(3), 1, 0),
        (Branches(3, biased=(0, 1, 2)), 1, 0),
        (Branches(3, biased=(1,)), 1, 1),
        (Branches(4, biased=(0, 2)), 2, 0),
        (Branches(1), 0, 1),
        (Branches(65), 1, 1),  # a call takes 64
        (Writes(2), 0, 2),
    ],
    ids=["three", "all biased", "one biased", "two and two", "one", "many", "written between"],
)
def test_linears_of_one_input_are_one_call(model, calls, alone):
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    y, changed, left = joined(model, x)
    assert (changed, left) == (calls, {ALONE: alone} if alone else {})
    for each, expected in zip(y, model(x), strict=True):
        assert (each - expected).norm() < 0.02 * expected.norm()
