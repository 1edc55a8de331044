"""Routers stay in float: they are recognised by what ranks their output."""

import pytest
import torch
import torch.nn.functional as F
from support import compile_once
from torch import nn

ROUTERS = {
    "softmax, topk": lambda y: torch.topk(torch.softmax(y.float(), -1), 2, dim=-1)[1],
    "topk": lambda y: y.view(-1, 8).topk(2)[1],
    "sigmoid with a correction": lambda y: torch.topk(y.sigmoid() + torch.arange(8), 2, dim=1)[1],
    "argmax": lambda y: torch.argmax(F.softmax(y, dim=-1), dim=-1),
}
OTHERS = {
    "topk over the rows": lambda y: torch.topk(y, 2, dim=0)[1],
    "argmax of all": lambda y: torch.argmax(y),
    "of a sum": lambda y: torch.topk(y.sum(-1), 2)[1],
    "not ranked": lambda y: torch.softmax(y, -1),
}


class Ranked(nn.Module):
    def __init__(self, ranking):
        super().__init__()
        self.gate, self.ranking = nn.Linear(16, 8).requires_grad_(False), ranking

    def forward(self, x):
        return self.ranking(self.gate(x))


def report_of(ranking, **options):
    torch.manual_seed(0)
    return compile_once(Ranked(ranking), torch.randn(4, 16), **options)[1]


@pytest.mark.parametrize("ranking", ROUTERS.values(), ids=ROUTERS)
def test_a_router_stays_in_float(ranking):
    (decision,) = report_of(ranking).refused
    assert decision.path == "gate"
    assert decision.reason.startswith("skip: a router (its output is ranked by ")


@pytest.mark.parametrize("ranking", OTHERS.values(), ids=OTHERS)
def test_what_is_not_ranked_along_its_outputs_is_no_router(ranking):
    assert len(report_of(ranking).accepted) == 1


def test_a_skip_list_of_ones_own_takes_the_place_of_the_default():
    ranking = ROUTERS["softmax, topk"]
    assert len(report_of(ranking, backend_options={"skip": []}).accepted) == 1
