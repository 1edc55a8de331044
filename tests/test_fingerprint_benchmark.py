"""benchmarks/fingerprint.py runs, on a tiny model; its times say nothing there."""

import json

import fingerprint
import torch

from int8fx import torch_private


def test_it_measures_both_and_says_what_the_check_costs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch_private, "compile_with_inductor", lambda gm, *rest: gm)
    torch._dynamo.reset()
    cost = fingerprint.main(["--rehearse", "--output", str(tmp_path / "cost.json")])
    assert cost.weights == 2 * 7  # q, k, v, o, gate, up and down of two layers
    said = " ".join(capsys.readouterr().out.split())
    for difference in (cost.pairs, cost.blocks):
        assert f"{difference.median * 1e6:.1f} us" in said
        assert f"{cost.share(difference):.2%} of a step" in said
    assert "by itself, for 14 weights" in said
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["share"] == cost.share(cost.blocks)
    assert written["cost"]["samples"]["median"] == cost.samples.median > 0
