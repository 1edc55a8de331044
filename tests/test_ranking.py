"""What is ranked or compared stays in float: it is recognised by what becomes of a linear's output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from int8fx.testing.support import compile_once


def grouped(scores):
    """As DeepSeek-V3: the best two of each group rank the groups, and experts of those groups win."""
    best = scores.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)
    chosen = torch.topk(best, k=2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter_(1, chosen, 1).unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
    return torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=2, dim=-1, sorted=False)[1]


def sparse_mixer(scores):
    """As PhiMoE: what is far below the largest is masked, and the index of the largest is used."""
    largest, index = scores.max(dim=-1, keepdim=True)
    factor = scores.abs().clamp(min=largest)
    masked = scores.masked_fill(((largest - scores) / factor) > 0.02, float("-inf"))
    return torch.softmax(masked, dim=-1).gather(dim=-1, index=index)


def written_to_a_buffer(scores):
    padded = scores.new_full((scores.shape[0], 10), float("-inf"))
    padded[:, :8] = scores
    return padded.topk(2)[1]


ROUTERS = {
    "softmax, topk": lambda y: torch.topk(torch.softmax(y.float(), -1), 2, dim=-1)[1],
    "topk": lambda y: y.view(-1, 8).topk(2)[1],
    "sigmoid with a correction": lambda y: torch.topk(y.sigmoid() + torch.arange(8), 2, dim=1)[1],
    "argmax": lambda y: torch.argmax(F.softmax(y, dim=-1), dim=-1),
    "groups": lambda y: grouped(y.sigmoid()),
    "only the groups": lambda y: y.view(-1, 4, 2).max(dim=-1).values.topk(2)[1],
    "sparsemixer": sparse_mixer,
    "normalised, clamped": lambda y: F.normalize(y.tanh().clamp(-1, 0.9), dim=-1).topk(2)[1],
    "sqrt of softplus": lambda y: F.softplus(y).sqrt().topk(2).indices,
    "noise": lambda y: (y + torch.randn_like(y) * F.softplus(y)).topk(2)[1],
    "gumbel": lambda y: F.gumbel_softmax(y, hard=True),
    "multinomial": lambda y: torch.multinomial(y.softmax(-1), 1),
    "sort": lambda y: y.sort(-1, descending=True)[1][:, :2],
    "argsort of negatives": lambda y: (-y).exp().argsort(-1),
    "index of max": lambda y: torch.max(y.relu(), dim=-1)[1],
    "split": lambda y: y.split(4, dim=-1)[1].topk(2)[1],
    "chunks joined": lambda y: (
        torch.cat(y.chunk(2, dim=-1)[::-1], -1).transpose(0, 1).topk(2, dim=0)[1]
    ),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y).topk(2)[1],
    "written to a buffer": written_to_a_buffer,
    "in a checkpointed body": lambda y: checkpoint(
        lambda y: y.exp().topk(2)[1], y, use_reentrant=False
    ),
    "behind a checkpointed body": lambda y: checkpoint(torch.exp, y, use_reentrant=False).topk(2)[1],
    # Experts that choose their tokens, and what a detector keeps of its queries.
    "topk over the rows": lambda y: torch.topk(y, 2, dim=0)[1],
    "argmax of all": lambda y: torch.argmax(y),
    "of a sum": lambda y: torch.topk(y.sum(-1), 2)[1],
}
DECISIONS = {
    "ranked by argmin": lambda y: y.square().argmin(-1),
    "ranked by kthvalue": lambda y: y.kthvalue(2, dim=-1)[1],
    "ranked by bucketize": lambda y: torch.bucketize(y, torch.arange(3.0)),
    "ranked by searchsorted": lambda y: torch.searchsorted(y.cumsum(-1), torch.ones(4, 1)),
    "ranked by bernoulli": lambda y: y.sigmoid().bernoulli(),
    "compared by gt": lambda y: y.sigmoid() > 0.5,
    "compared by ge": lambda y: torch.arange(4.0)[y.mean(-1) >= 0],
    "compared by lt": lambda y: torch.where(y < 0, torch.ones(8), torch.zeros(8)),
    "compared by le": lambda y: torch.cond((y <= 0).any(), torch.sin, torch.cos, (y,)),
    "compared by eq": lambda y: (y == y.amax(-1, keepdim=True)).float().sum(-1),
    "compared by long": lambda y: torch.arange(9.0)[y[0].sigmoid().long()],
}
OTHERS = {
    "not ranked": lambda y: torch.softmax(y, -1),
    "pooled": lambda y: y.max(dim=0).values,
    "the largest values": lambda y: y.topk(2)[0],
    "sorted values": lambda y: y.sort(-1).values,
    "quantised": lambda y: (y / y.abs().amax() * 127).round().clamp(-128, 127).to(torch.int8),
    "quantised and back": lambda y: (y * 10).round().to(torch.int8).float() / 10,
    "relu by hand": lambda y: torch.where(y > 0, y, 0.1 * y),
    "relu by a product": lambda y: (y > 0).float() * y,
    "relu in place": lambda y: y.clone().masked_fill_(y < 0, 0),
    "what is largest, amplified": lambda y: torch.where(y == y.amax(), y * 20, y),
    "guarded against infinities": lambda y: y.clamp(
        max=torch.where(torch.isinf(y).any(), torch.tensor(9.0), torch.tensor(99.0))
    ),
    "its shape": lambda y: (
        torch.arange(y.shape[-1]).expand_as(y).argmax(-1) + torch.zeros_like(y).argmax()
    ),
    "at an index of others": lambda y: y[torch.arange(4), torch.tensor([3, 1, 2, 0]).argsort()],
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


@pytest.mark.parametrize("what", DECISIONS)
def test_what_else_decides_stays_in_float(what):
    (decision,) = report_of(DECISIONS[what]).refused
    assert decision.reason == f"skip: its output is {what}"


@pytest.mark.parametrize("ranking", OTHERS.values(), ids=OTHERS)
def test_what_is_neither_ranked_nor_compared_is_no_router(ranking):
    assert len(report_of(ranking).accepted) == 1


def test_a_skip_list_of_ones_own_takes_the_place_of_the_default():
    ranking = ROUTERS["softmax, topk"]
    assert len(report_of(ranking, backend_options={"skip": []}).accepted) == 1


class Codebook(nn.Module):
    """The nearest of 32 codes, in one of the spellings below, passed on straight-through."""

    def __init__(self, distances):
        super().__init__()
        self.project, self.out = nn.Linear(24, 16), nn.Linear(16, 24)
        self.codes, self.distances = nn.Parameter(torch.randn(32, 16)), distances

    def forward(self, x):
        z = self.project(x)
        codes = self.codes[self.distances(z, self.codes).argmin(-1)]
        return self.out(z + (codes - z).detach())


DISTANCES = {
    "cdist": lambda z, codes: torch.cdist(z, codes),
    "squares": lambda z, codes: (
        z.pow(2).sum(-1, keepdim=True) - 2 * z @ codes.t() + codes.pow(2).sum(-1)
    ),
    "differences": lambda z, codes: (z.unsqueeze(-2) - codes).norm(dim=-1),
}


@pytest.mark.parametrize("distances", DISTANCES.values(), ids=DISTANCES)
def test_codebooks_are_rankings(distances):
    torch.manual_seed(0)
    model = Codebook(distances).requires_grad_(False)
    _, report = compile_once(model, torch.randn(4, 24))
    reasons = {decision.path: decision.reason for decision in report.decisions}
    assert reasons["project"] == "skip: its output is ranked by argmin"
    assert reasons["out"] == ""
    assert reasons.get("codes", "not there") != ""


class Indexer(nn.Module):
    """As DeepSeek-V3.2's: each query keeps the keys of the largest scores, weighed over its heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.heads = nn.Linear(64, 4 * 16), nn.Linear(64, 16), nn.Linear(64, 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        scores = torch.relu(torch.matmul(q, self.norm(self.k(x)).mT.unsqueeze(1))) * 16**-0.5
        weighed = torch.matmul(self.heads(x).unsqueeze(-2), scores.transpose(1, 2)).squeeze(-2)
        return weighed.topk(3, dim=-1).indices


def test_indexers_are_rankings():
    torch.manual_seed(0)
    _, report = compile_once(Indexer().requires_grad_(False), torch.randn(2, 5, 64))
    reasons = {decision.path: decision.reason for decision in report.decisions if decision.shape}
    reason = "skip: its output is ranked by topk, behind a product of two activations"
    assert reasons == dict.fromkeys(("q", "k", "heads"), reason)


class Layer(nn.Module):
    """A layer with attention in single products, a router, and two experts, each read by all."""

    def __init__(self, K, prenorm, scale):
        super().__init__()
        self.prenorm, self.scale = prenorm, scale
        self.q, self.k, self.v, self.o = (nn.Linear(K, K) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(K, 2), nn.Linear(K, 2 * K), nn.Linear(2 * K, K)
        self.norms = nn.ModuleList(nn.LayerNorm(K) for _ in range(2))

    def forward(self, h):
        h = self.around(h, self.attend, self.norms[0])
        return self.around(h, self.feed, self.norms[1])

    def around(self, h, part, norm):
        if self.prenorm:
            return h + self.scale * part(norm(h))
        return norm(self.scale * h + part(h))

    def attend(self, x):
        scores = (self.q(x) @ self.k(x).mT).softmax(-1)
        return self.o(scores @ self.v(x))

    def feed(self, x):
        weight, expert = self.gate(x).softmax(-1).topk(1)
        return self.down(F.gelu(self.up(x))) * weight * expert.clamp(1, 1)


class Stack(nn.Module):
    """Whose hidden states are ranked in the end: for a pooling, against all, and by a threshold."""

    def __init__(self, prenorm=True, scale=1.0):
        super().__init__()
        self.embed, self.position = nn.Linear(24, 32), nn.Parameter(torch.randn(5, 32))
        self.layers = nn.ModuleList(Layer(32, prenorm, scale) for _ in range(2))
        self.head = nn.Linear(32, 40)

    def forward(self, x, ids):
        h = self.embed(x) + self.position
        for layer in self.layers:
            h = layer(h)
        last = h[torch.arange(2), ids.argmax(-1)]
        return self.head(h), last, h.max(dim=1).values, h.argmax(-1), h > 0


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_stream_of_hidden_states_is_no_linears_output(prenorm, scale):
    torch.manual_seed(0)
    model = Stack(prenorm, scale).requires_grad_(False)
    ids = torch.tensor([[1, 2, 9, 0, 0], [3, 9, 0, 0, 0]])
    _, report = compile_once(model, torch.randn(2, 5, 24), ids)
    left = {decision.path for decision in report.decisions if decision.reason and decision.shape}
    assert left == {"layers.0.gate", "layers.1.gate"}


def test_a_search_is_bounded(monkeypatch):
    """Behind so many values no ranking is looked for, and the compile takes no longer for it."""
    from int8fx.passes.linears import ranking

    def far(y):
        for _ in range(40):
            y = y.sin()
        return y.topk(2)[1]

    assert report_of(far).refused
    monkeypatch.setattr(ranking, "BUDGET", 30)
    assert report_of(far).accepted
