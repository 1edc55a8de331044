"""``int8fx.refresh``: for what no comparison sees."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import int8fx
from int8fx.testing.support import Mlp, assert_close_to_float64, interpreted
from int8fx.weights.identity import ALL_SETS, snapshot
from int8fx.weights.store import STORE

K, N = 256, 512


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Mlp(K, N).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1))


def expected(model, x):
    up, down = model.up, model.down
    hidden = torch.relu(x.double() @ up.weight.double().t() + up.bias.double())
    return hidden @ down.weight.double().t()


def written_unseen(weight):
    """Changes a few elements that lie in no sample, by so much that the output is another one."""
    before = snapshot([weight])
    flat = weight.data.view(-1)
    for start in range(64, flat.numel() - 16, 64):
        kept = flat[start : start + 8].clone()
        flat[start : start + 8] = 50.0
        if before.matches([weight]):
            return
        flat[start : start + 8] = kept
    raise AssertionError("every element is sampled")


def is_stale(call, model, x):
    y = call(x).double()
    return bool((y - expected(model, x)).norm() > 0.1 * y.norm())


@pytest.mark.parametrize("what", ["the model", "what is compiled", "a part", "everything"])
def test_a_few_elements_written_unseen_are_seen_after_a_refresh(model, x, what):
    compiled = torch.compile(model, backend="llmint8")
    call = interpreted(model)
    call(x)
    written_unseen(model.up.weight)
    assert is_stale(call, model, x)
    given = {
        "the model": [model],
        "what is compiled": [compiled],
        "a part": [model.up],
        "everything": [],
    }
    assert int8fx.refresh(*given[what]) is None
    assert_close_to_float64(call(x), expected(model, x), K)


def test_threads_that_call_meanwhile_hear_of_it(model, x):
    call = interpreted(model, check_weights=False)
    call(x)
    stop = threading.Event()

    def calls():
        while not stop.is_set():
            call(x)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(calls) for _ in range(3)]
        for _ in range(20):
            model.up.weight.data.mul_(-1.1)
            int8fx.refresh(model)
            assert_close_to_float64(call(x), expected(model, x), K)
        stop.set()
    assert not [each.exception() for each in running if each.exception()]


def test_every_graph_of_the_model_quantises_again(model, x):
    calls = [interpreted(model), interpreted(model)]
    inputs = [x, x[:1]]
    for call, rows in zip(calls, inputs, strict=True):
        call(rows)
    written_unseen(model.down.weight)
    int8fx.refresh(model)
    for call, rows in zip(calls, inputs, strict=True):
        assert_close_to_float64(call(rows), expected(model, rows), K)


def test_weights_of_other_modules_stay_unless_they_share_memory(model, x):
    other, alias = nn.Linear(K, N).requires_grad_(False), nn.Linear(K, N).requires_grad_(False)
    alias.weight = nn.Parameter(model.up.weight.data, requires_grad=False)
    for each in (model, other, alias):
        interpreted(each)(x)
    (kept,) = STORE.forms(other.weight)
    int8fx.refresh(model.up)
    assert not STORE.forms(model.up.weight) and not STORE.forms(alias.weight)
    assert STORE.forms(other.weight) == [kept] and len(STORE.forms(model.down.weight)) == 1


def test_a_buffer_is_refreshed_too(x):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(K, N))

        def forward(self, x):
            return x @ self.weight

    torch._dynamo.reset()
    model = Buffered()
    interpreted(model, only=["*"])(x)
    assert STORE.forms(model.weight)
    int8fx.refresh(model)
    assert not STORE.forms(model.weight)


def test_weights_in_int8_are_always_what_they_are(x):
    torch._dynamo.reset()
    model = int8fx.quantize_(nn.Linear(K, N))
    call = interpreted(model)
    y = call(x)
    int8fx.refresh(model)
    assert torch.equal(call(x), y)


@pytest.mark.parametrize("given", ["fc", torch.zeros(2, 2), len, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_named(given):
    message = f"refresh: given {type(given).__name__}; allowed: a torch.nn.Module"
    with pytest.raises(TypeError, match=re.escape(message)):
        int8fx.refresh(given)


@pytest.mark.parametrize("given", ["no", 0, None])
def test_the_check_is_on_or_off(model, x, given):
    with pytest.raises(ValueError, match=r"'check_weights'.*given.*allowed: True or False"):
        int8fx.Options.parse({"check_weights": given})


def test_without_the_check_no_content_is_read(model, x, monkeypatch):
    call = interpreted(model, check_weights=False)
    call(x)
    kind = type(snapshot([x]))
    asked, matches = [], kind.matches

    def counting(self, tensors, sets=ALL_SETS, first=0):
        asked.append(sets)
        return matches(self, tensors, sets, first)

    monkeypatch.setattr(kind, "matches", counting)
    call(x)
    interpreted(model)(x)
    assert asked[0] == 0 and asked[-1] != 0


WITHOUT_MEMORY = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(2)], layout=torch.jagged),
    "on meta": lambda: torch.empty(3, device="meta"),
    "empty": lambda: torch.empty(0),
    "mkldnn": lambda: torch.randn(3, 3).to_mkldnn(),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantize_per_tensor|torch.ao)")
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_tensors_of_every_kind_are_refreshed_and_trained(model, x, kind):
    """The hook is behind the step of every optimizer of the process, whatever it trains."""
    interpreted(model)(x)
    assert STORE.forms(model.up.weight)
    tensor = WITHOUT_MEMORY[kind]()
    holder = nn.Module()
    holder.register_buffer("held", tensor)
    int8fx.refresh(holder)
    if tensor.is_floating_point():
        Idle([tensor if kind == "lazy" else nn.Parameter(tensor)]).step()


class Idle(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_a_refresh_inside_of_a_transform(model, x, transform):
    call = interpreted(model)
    call(x)
    model.up.weight.detach().numpy()[3] = 50.0

    def refreshed(held):
        holder = nn.Module()
        holder.register_buffer("held", held)
        int8fx.refresh(holder)
        int8fx.refresh(model)
        return held

    transform(refreshed)(torch.randn(3, 3))
    assert_close_to_float64(call(x), expected(model, x), K)
