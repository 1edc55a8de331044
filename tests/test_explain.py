"""explain: its rows against hand counts, what it shows, and that it leaves everything as it was."""

import json
import math
import statistics
import sys
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import int8fx
from int8fx.analysis.explanation.plots import distinct_inputs, draw, pooled
from int8fx.analysis.observe import THRESHOLDS
from int8fx.errors import UserError
from int8fx.testing.hand_counts import assert_counted_by_hand
from int8fx.testing.toy_llama import llama, tiny
from int8fx.weights.store import STORE

K, N, M = 16, 24, 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1))


def test_smollm2s_210_linears_and_its_head_by_hand_count():
    shown = int8fx.explain(llama(30), torch.arange(8)[None], use_cache=False)
    assert_counted_by_hand(shown, tokens=8, vocabulary=128)


def test_outliers_and_sqnr_by_hand(model, x):
    x[0, 3], x[4, 3], x[2, 7] = 9.0, -7.0, 6.0
    row = int8fx.explain(model, x).rows[0]
    assert (row.outlier_columns, row.outlier_elements, row.rows, row.calls) == (2, 3, M, 1)
    assert row.input_absmax == 9.0
    assert row.channel_absmax == tuple(x.abs().amax(0).tolist())
    linear = model[0]
    expected = x.double() @ linear.weight.double().t() + linear.bias.double()
    for threshold in (6.0, *THRESHOLDS):
        scheme = int8fx.SCHEMES["llm.int8"]
        y = scheme.reference(x, linear.weight, linear.bias, scheme.settings(threshold=threshold))
        decibels = 10 * math.log10(expected.square().sum() / (y - expected).square().sum())
        assert row.sqnr_db_at[threshold] == pytest.approx(decibels, abs=0.01)
    assert row.sqnr_db == row.sqnr_db_at[6.0]


def test_a_scheme_without_outliers_shows_none():
    linear = nn.Linear(32, 16).requires_grad_(False)
    x = torch.full((4, 32), 9.0)
    (row,) = int8fx.explain(linear, x, options={"scheme": "absmax-vector"}).rows
    assert row.outlier_columns is None and row.outlier_elements is None and row.input_absmax == 9.0
    (row,) = int8fx.explain(linear, x).rows
    assert (row.outlier_columns, row.outlier_elements) == (32, 4 * 32)


def test_rules_give_a_scheme_by_module(model, x):
    options = {"rules": [("2", "absmax-row"), ("*", "llm.int8", {"threshold": 2.0})]}
    first, second = int8fx.explain(model, x, options=options).rows
    assert (first.scheme, second.scheme) == ("llm.int8", "absmax-row")
    assert first.sqnr_db == first.sqnr_db_at[2.0]
    assert second.sqnr_db_at == {}


def test_patterns_that_decide_nothing_are_named(model, x):
    options = {
        "skip": ["2", "no.such"],
        "only": ["*"],
        "rules": [("0", "llm.int8"), ("0", "absmax-row"), ("attn.*", "llm.int8")],
    }
    shown = int8fx.explain(model, x, options=options)
    assert shown.unused == ("skip: 'no.such'", "rules: '0': absmax-row", "rules: 'attn.*': llm.int8")
    assert "matches nothing: skip: 'no.such'" in str(shown)


def test_default_skip_patterns_are_not_the_users(model, x):
    assert int8fx.explain(model, x).unused == ()


def test_the_model_is_left_as_it_was(model, x):
    torch._dynamo.reset()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    for _ in range(10):  # more than Dynamo compiles of one function
        int8fx.explain(compiled, x)
    compiled(x)
    assert counter.frame_count == 1
    assert not any(map(STORE.forms, model.parameters()))
    assert [parameter._version for parameter in model.parameters()] == versions
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_model_that_compiles_in_place(model, x):
    counter = CompileCounter()
    model.compile(backend=counter)
    assert int8fx.explain(model, x).totals.accepted == 2
    assert counter.frame_count == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, K)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.fc(x)


def test_blocks_that_share_a_graph_are_told_apart(x):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block(), Block()])}).requires_grad_(False)

    def run(x):
        for block in model["blocks"]:
            x = block(x)
        return x

    model.forward = run
    shown = int8fx.explain(model, x)
    assert [row.path for row in shown.rows] == [f"blocks.{index}.fc" for index in range(3)]
    assert {row.calls for row in shown.rows} == {1}
    assert len({row.sqnr_db for row in shown.rows}) == 3
    assert shown.totals.float_bytes == 3 * 4 * K * K
    assert shown.graph_breaks and all(__file__ in each.where for each in shown.graph_breaks)
    assert f"graph break at {__file__}" in str(shown).replace("\n", "")


def test_a_frame_that_is_compiled_again_says_why():
    torch._dynamo.reset()
    layer = nn.Linear(K, K).requires_grad_(False)

    def inner(x, scale):
        torch._dynamo.graph_break()
        return layer(x) * scale

    def run(x):
        torch._dynamo.graph_break()
        return inner(inner(x, 2), 3)

    shown = int8fx.explain(run, torch.randn(M, K))
    assert any("scale" in reason for reason in shown.recompiles)


def test_a_branch_that_is_not_taken_is_listed(x):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            return torch.cond(x.sum() * 0 == 0, lambda x: self.yes(x), lambda x: self.no(x), (x,))

    yes, no = sorted(int8fx.explain(Branches(), x).rows, key=lambda row: -row.calls)
    assert (yes.path, yes.calls, no.path, no.calls) == ("yes", 1, "no", 0)
    assert yes.sqnr_db is not None and no.sqnr_db is None and no.outlier_columns is None
    assert no.kept_bytes == yes.kept_bytes


def test_a_weight_that_two_linears_share_counts_once(x):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, K, bias=False)

        def forward(self, x):
            return self.fc(self.fc(x))

    shown = int8fx.explain(Twice(), x)
    assert [row.path for row in shown.rows] == ["fc", "fc"]
    assert shown.totals.float_bytes == 4 * K * K
    assert shown.totals.flops == 2 * 2 * M * K * K


def test_attentions_products_are_rows_of_their_own():
    shown = int8fx.explain(tiny(attn_implementation="eager"), torch.arange(6)[None])
    products = [row for row in shown.rows if row.reason == "both operands are activations"]
    assert len(products) == 4
    assert all(
        row.path.startswith(f"model.layers.{i // 2}.self_attn.") for i, row in enumerate(products)
    )
    assert {row.flops for row in products} == {2 * 4 * 6 * 6 * 8}
    assert {row.calls for row in products} == {1}


def test_autocast_does_not_blur_the_reference(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        first = int8fx.explain(model, x).rows[0]
    assert first.sqnr_db == pytest.approx(int8fx.explain(model, x).rows[0].sqnr_db, abs=1.5)


def test_json_has_no_infinity(x):
    linear = nn.Linear(K, K, bias=False).requires_grad_(False)
    linear.weight.zero_()
    values = int8fx.explain(linear, x).to_dict()
    text = json.dumps(values, allow_nan=False)
    (row,) = json.loads(text)["rows"]
    assert row["exact"] is True and row["sqnr_db"] is None
    assert row["sqnr_db_at"].keys() == {f"{each:g}" for each in THRESHOLDS}


def test_the_page_needs_no_other_file(model, x, tmp_path):
    shown = int8fx.explain(model, x, options={"skip": ["2"]})
    page = tmp_path / "page.html"
    shown.to_html(page)
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert "http" not in text and "<script src" not in text and "<link" not in text
    for words in ("<td>0</td>", "<td>2</td>", "skip: matches &#x27;2&#x27;", f"<td>{N} x {K}</td>"):
        assert words in text
    assert shown._repr_html_() in text


class Cells(HTMLParser):
    """The cells of every line of a page's tables; fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lines: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        if tag != "img":
            self.open.append(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.lines[-1][-1] += data


def test_in_a_notebook_it_shows_itself_and_needs_no_matplotlib(model, x, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = int8fx.explain(model, x, options={"skip": ["2", "<none>"]})
    cells = Cells()
    cells.feed(shown._repr_html_())
    cells.close()
    assert cells.open == []
    headings, *_ = [line for line in cells.lines if line[0] == "module"]
    rows = [
        dict(zip(headings, line, strict=True)) for line in cells.lines if len(line) == len(headings)
    ]
    first, second = rows[1:]
    assert (first["module"], first["scheme"], first["N x K"]) == ("0", "llm.int8", f"{N} x {K}")
    assert first["SQNR dB"] == f"{shown.rows[0].sqnr_db:.1f}" and first["rows"] == str(M)
    assert (second["module"], second["scheme"], second["SQNR dB"]) == ("2", "float", "")
    assert second["reason"] == shown.rows[1].reason != ""
    assert "<li>matches nothing: skip: &#x27;&lt;none&gt;&#x27;</li>" in shown._repr_html_()


def test_the_figure_shows_what_was_measured(tmp_path):
    shown = int8fx.explain(tiny(), torch.arange(6)[None])
    inputs = distinct_inputs(shown.rows)
    names = ["q_proj/k_proj/v_proj", "o_proj", "gate_proj/up_proj", "down_proj"]
    assert list(inputs) == names
    figure = draw(shown)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == names
    heat = figure.axes[3].images[0].get_array()
    assert heat.shape == (2, 64)
    assert 6 * 2 ** heat[1].max() == pytest.approx(max(inputs["down_proj"][1].channel_absmax))
    panels = {axes.get_title(): axes for axes in figure.axes}
    by_layer = panels["SQNR of the output, by layer"].lines
    medians = panels["Median SQNR, by threshold"].lines
    kinds = [name for joined in names for name in joined.split("/")]
    for index, name in enumerate(kinds):
        rows = [row for row in shown.rows if row.path.endswith(name)]
        assert by_layer[index].get_ydata().tolist() == [row.sqnr_db for row in rows]
        # None, the last, is a threshold of 0.
        at = [statistics.median(row.sqnr_db_at[each] for row in rows) for each in THRESHOLDS]
        assert medians[index].get_ydata().tolist() == at
    bars = [round(bar.get_height() * 2**20) for bar in panels["Weights, MiB"].patches]
    assert bars[:2] == [shown.totals.float_bytes, shown.totals.kept_bytes]
    path = tmp_path / "figure.png"
    shown.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_pooling_keeps_every_spike():
    values = [0.0] * 1000
    values[577] = 3.0
    assert max(pooled(values, 192)) == 3.0 and len(pooled(values, 192)) == 192
    assert pooled([1.0, 2.0], 192) == [1.0, 2.0]


def test_nothing_to_draw_is_said(model, x, tmp_path):
    shown = int8fx.explain(model, x, options={"skip": ["*"]})
    with pytest.raises(UserError, match="no linear was quantised"):
        shown.plot(tmp_path / "figure.png")


def test_drawing_without_matplotlib_says_what_to_install(model, x, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "int8fx\[plot\]"'):
        int8fx.explain(model, x).plot(tmp_path / "figure.png")


def test_bad_options_are_refused_before_anything_runs(model, x):
    model.forward = lambda x: pytest.fail("it ran")
    with pytest.raises(ValueError, match=r"'int9'.*'llm.int8'"):
        int8fx.explain(model, x, options={"scheme": "int9"})


def test_a_function_of_no_module(x):
    weight = torch.randn(N, K)
    shown = int8fx.explain(lambda x: F.linear(x, weight), x)
    assert [row.accepted for row in shown.rows] == [False]
    assert shown.totals.model_bytes == 0
