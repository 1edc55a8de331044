"""passes/graph/outline.py: equal layers become one sub-graph, and every result stays the same bit."""

import pytest
import torch
from torch import nn

import int8fx
from int8fx import torch_private
from int8fx.compiler import inductor
from int8fx.kernels import table
from int8fx.kernels.ops import int8_linear as ops
from int8fx.passes import order
from int8fx.passes.graph.outline import (
    CONSTANT,
    NOTHING,
    SHARES,
    UNLIKE,
    Repeat,
    longest_repeat,
)
from int8fx.testing.toy_llama import tiny

K = 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x):
        y = self.up(self.norm(x))
        return x + self.down(torch.nn.functional.silu(y) * torch.tanh(y) + y.relu())


class Stack(nn.Module):
    def __init__(self, layers: int, layer: type = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def without_inductor(monkeypatch):
    """The graphs that Inductor would get; they run operator by operator."""
    graphs = []

    def keep(gm, *rest):
        graphs.append(gm)
        return gm

    monkeypatch.setattr(torch_private, "compile_with_inductor", keep)
    return graphs


def run(model, *args, outlining=True, **kwargs):
    """The output, and what the pass says of each graph."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        if not outlining:
            rest = tuple(each for each in order.PASSES if each.name != "outline")
            patch.setattr(order, "PASSES", rest)
        with int8fx.collect_reports() as reports, torch.no_grad():
            y = torch.compile(model, backend="llmint8", fullgraph=True, **kwargs)(*args)
    said = [each for report in reports for each in report.passes if each.name == "outline"]
    return y, said


def bodies(gm):
    return [name for name, _ in gm.named_children() if name.startswith("outlined")]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("x" + "abcdefgh" * 3 + "y", Repeat(1, 8, 24)),
        ("abcdefgh" * 3 + "abcd", Repeat(0, 8, 28)),
        ("abcdefgh" * 2, None),
        ("abc" * 9, None),  # short periods are not worth a call, nor is a multiple that is one
        ("aabbccddeeffgg", None),
        ("", None),
    ],
)
def test_the_longest_repeat(kinds, expected):
    found = longest_repeat(list(kinds))
    if expected is None and found is not None:
        assert found.period >= 8 and kinds[: found.period] * 3 == kinds[: 3 * found.period]
    else:
        assert found == expected


def test_equal_layers_are_calls_of_one_body(without_inductor):
    model, x = Stack(5), torch.randn(4, K)
    expected, _ = run(model, x, outlining=False)
    y, (said,) = run(model, x)
    assert torch.equal(y, expected)
    gm = without_inductor[-1]
    assert len(bodies(gm)) == 1 and said.changed >= 4
    calls = gm.graph.find_nodes(op="call_function", target=torch_private.subgraph_call())
    assert len(calls) == said.changed
    assert len(gm.graph.nodes) < len(without_inductor[0].graph.nodes)


def test_rows_inside_of_a_body_count_for_inductors_settings(monkeypatch):
    """A GPU's kernels read whole rows, which Inductor must not split."""
    patches = []

    def keep(gm, inputs, given, *rest):
        patches.append(given)
        return gm

    monkeypatch.setattr(torch_private, "compile_with_inductor", keep)
    monkeypatch.setattr(table, "with_whole_rows", lambda: frozenset({ops.int8_linears}))
    for longest, expected in ((K - 1, False), (2 * K, None)):
        monkeypatch.setattr(inductor, "WHOLE_ROW", longest)
        _, (said,) = run(Stack(5), torch.randn(4, K))
        assert said.changed >= 4 and patches[-1].get("split_reductions") is expected


def test_and_inductor_compiles_them_to_the_same():
    model, x = Stack(4), torch.randn(4, K)
    expected, _ = run(model, x, outlining=False)
    y, (said,) = run(model, x)
    assert said.changed >= 3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_the_same(cache, without_inductor):
    prompt = torch.arange(8)[None]
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    wanted = {
        "max_new_tokens": 4,
        "do_sample": False,
        "disable_compile": True,
        "pad_token_id": 0,
        **kind,
    }
    model = tiny(5).requires_grad_(False)
    expected = model.generate(prompt, **wanted)
    torch._dynamo.reset()
    model.compile(backend="llmint8")
    with int8fx.collect_reports() as reports:
        assert torch.equal(model.generate(prompt, **wanted), expected)
    said = [each for report in reports for each in report.passes if each.name == "outline"]
    # A step's graph of a dynamic cache has a length of its own for each layer: see equal_lengths.
    assert len(said) == 2
    assert all(each.changed >= 3 for each in said)
    # What writes to the cache stays outside: Inductor would copy the cache for a body that does.
    for gm in without_inductor:
        inside = [node for name in bodies(gm) for node in getattr(gm, name).graph.nodes]
        assert not any(str(node.target).endswith("_") or "copy_" in str(node.target) for node in inside)


class ReadsItsNumber(Layer):
    """Each layer multiplies by another constant."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        ReadsItsNumber.made += 1
        self.scale = 1.0 + ReadsItsNumber.made

    def forward(self, x):
        return super().forward(x) * self.scale


def test_layers_with_other_constants_are_not_equal(without_inductor):
    model, x = Stack(4, ReadsItsNumber), torch.randn(4, K)
    expected, _ = run(model, x, outlining=False)
    y, _ = run(model, x)
    assert torch.equal(y, expected)


class Looks(Layer):
    """Looks its scales up in a table that is made at each call, by an index or by a list."""

    def __init__(self, by_list: bool = False) -> None:
        super().__init__()
        self.by_list = by_list

    def forward(self, x):
        if self.by_list:
            return super().forward(x)[:, [(7 * k) % K for k in range(K)]]
        return super().forward(x) * torch.tensor([0.5, 2.0, 1.0, 0.25] * 5)[torch.arange(K) % 20]


@pytest.mark.parametrize("by_list", [False, True], ids=["by index", "by list"])
def test_layers_that_make_constants_are_right(by_list):
    """Inductor of torch 2.13 does not define the constants of a body."""
    model, x = Stack(5, lambda: Looks(by_list)), torch.randn(4, K)
    expected, _ = run(model, x, outlining=False)
    y, (said,) = run(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert said.changed == 0 and said.refused[CONSTANT] >= 4


class Crossed(nn.Module):
    """Like calls, of which one layer reads other values than the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(K, K) for _ in range(6))
        self.requires_grad_(False)

    def forward(self, x):
        before = x
        for number, layer in enumerate(self.layers):
            y = layer(x)
            other = before if number % 2 else x
            y = torch.tanh(y) + torch.sigmoid(other) * torch.cos(x) - torch.sin(y)
            before, x = x, torch.relu(y) + other
        return x


def test_values_are_told_apart(without_inductor):
    model, x = Crossed(), torch.randn(4, K)
    expected, _ = run(model, x, outlining=False)
    y, _ = run(model, x)
    assert torch.equal(y, expected)


class Shared(nn.Module):
    """Every layer's result is kept as a view of it as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x):
        kept = []
        for layer in self.layers:
            x = layer(x)
            kept.append(x.view(2, 2, K))
        return x, *kept


def test_results_that_share_memory_stay_where_they_are(without_inductor):
    model, x = Shared(), torch.randn(4, K)
    expected, _ = run(model, x, outlining=False)
    y, (said,) = run(model, x)
    assert all(map(torch.equal, y, expected))
    assert said.changed or set(said.refused) <= {SHARES, NOTHING, UNLIKE}


def test_few_layers_and_training_are_left(without_inductor):
    _, (said,) = run(Stack(2), torch.randn(4, K))
    assert said.changed == 0 and said.refused == {NOTHING: 1}
    torch._dynamo.reset()
    x = torch.randn(4, K, requires_grad=True)
    with int8fx.collect_reports() as reports:
        torch.compile(Stack(4), backend="llmint8")(x)
    (said,) = [each for each in reports[0].passes if each.name == "outline"]
    assert said.skipped == "a gradient may be asked for"
