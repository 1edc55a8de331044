"""The option ``dump_graphs``: each graph before and after each pass that changed it."""

import pytest
import torch
from torch import nn

import int8fx
from int8fx.passes import order
from int8fx.testing.support import compile_once, interpreted

K = 32


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K)).requires_grad_(False)


def test_each_pass_that_changed_the_graph_shows_it_before_and_after(model, tmp_path):
    folder = tmp_path / "not" / "there"
    x = torch.randn(3, K)
    y, report = compile_once(model, x, backend_options={"dump_graphs": str(folder)})
    numbers = {each.name: number for number, each in enumerate(order.PASSES, 1)}
    changed = [each.name for each in report.passes if each.changed]
    assert changed == ["lower", "join_linears"]
    expected = {f"{numbers[name]:02}_{name}.{when}.py" for name in changed for when in WHEN}
    assert {path.name for path in (folder / "graph_0").iterdir()} == expected

    texts = [
        (folder / "graph_0" / f"{numbers[name]:02}_{name}.{when}.py").read_text()
        for name in changed
        for when in WHEN
    ]
    before, lowered, lowered_again, joined = texts
    assert before.count("torch._C._nn.linear(") == 2
    assert lowered.count("int8fx.int8_linear.default(") == 2
    assert lowered == lowered_again
    assert joined.count("int8fx.int8_linears.default(") == 2
    for text in texts:
        compile(text, "dumped", "exec")
    assert torch.equal(y, compile_once(model, x)[0])


WHEN = ("before", "after")


def test_each_graph_has_a_folder_of_its_own(model, tmp_path):
    for rows in (3, 4):
        interpreted(model, dump_graphs=tmp_path)(torch.randn(rows, K))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_0", "graph_1"]


def test_explain_writes_the_graphs_that_would_be_compiled_once(model, tmp_path):
    int8fx.explain(model, torch.randn(3, K), options={"dump_graphs": tmp_path})
    (folder,) = tmp_path.iterdir()
    assert "int8fx.int8_linears" in (folder / "04_join_linears.after.py").read_text()


@pytest.mark.parametrize("given", [3, "", True, b"graphs"], ids=repr)
def test_what_is_no_folder_is_named(given):
    with pytest.raises(ValueError, match=r"'dump_graphs'.*given.*allowed: a path of a folder"):
        int8fx.Options.parse({"dump_graphs": given})


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"'dump_graphs'.*given '.*file'.*allowed: a path of a folder"):
        int8fx.Options.parse({"dump_graphs": str(tmp_path / "file")})
