"""``--method``: what is refused before a model is loaded, and that files hold what quantize_ makes."""

import json

import pytest
import torch

import int8fx
from int8fx.bench import models
from int8fx.cli.app import main
from int8fx.cli.method import schemes_of
from int8fx.testing.toy_llama import saved_model

GROUPED = "it serves w4a16-group, w4a8-group, wna16-group"


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@pytest.fixture
def unloaded(monkeypatch):
    """A model that is loaded is a failure."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{index % 100}" for index in range(200)))
    return file


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--method", "gptqq"], "--method gptqq: allowed are rtn, hqq, gptq, awq"),
        (["--scheme", "llm.int8", "--method", "gptq"], "gptq does not serve llm.int8; " + GROUPED),
        (["--scheme", "nf4", "--method", "awq"], "awq does not serve nf4; it serves w4a16-group"),
        (["--scheme", "w4a16-group,zeros=middle", "--method", "hqq"], "allowed: zeros='float'"),
        (["--rule", "*.q_proj=w8a16", "--scheme", "w4a16-group", "--method", "gptq"], "serve w8a16"),
        (["--scheme", "w4a16-group", "--method", "hqq", "--method-text", "x"], "hqq reads no text"),
        (["--scheme", "w4a16-group", "--method-text", "x"], "rtn reads no text; gptq and awq do"),
        (["--scheme", "w4a16-group", "--method", "gptq", "--method-text", "./no"], "--method-text no"),
        (["--scheme", "w4a16-group", "--method", "gptq", "--method-tokens", "0"], "whole numbers"),
    ],
)
def test_refused_before_a_model_is_loaded(capsys, unloaded, tmp_path, command, given, words):
    (tmp_path / "model").mkdir()
    out = [tmp_path / "out"] if command == "quantize" else []
    code, _, err = run(capsys, command, tmp_path / "model", *out, *given)
    assert code != 0 and words in " ".join(err), err


def test_an_empty_text_is_refused(capsys, unloaded, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "empty.txt").write_text(" ")
    given = ["--scheme", "w4a16-group", "--method", "gptq", "--method-text", tmp_path / "empty.txt"]
    code, _, err = run(capsys, "quantize", tmp_path / "model", tmp_path / "out", *given)
    assert code != 0 and "an empty file" in err[-1]


def test_evaluate_asks_for_another_text_than_is_judged(capsys, unloaded, text, tmp_path):
    (tmp_path / "model").mkdir()
    given = ["evaluate", tmp_path / "model", "--scheme", "w4a16-group", "--method", "gptq"]
    code, _, err = run(capsys, *given)
    assert code != 0 and "--method gptq needs --method-text FILE" in err[-1]
    code, _, err = run(capsys, *given, "--text", text, "--method-text", text)
    assert code != 0 and "is the text that is judged" in err[-1]


def test_evaluate_injects_no_outliers_into_what_is_quantised(capsys, unloaded, tmp_path):
    (tmp_path / "model").mkdir()
    given = ["evaluate", tmp_path / "model", "--scheme", "w4a16-group", "--inject", 10]
    code, _, err = run(capsys, *given, "--method", "hqq")
    assert code != 0 and "--inject 10 changes weights that --method hqq has quantised" in err[-1]


def test_schemes_of_round_to_nearest_are_all():
    assert schemes_of("rtn") == list(int8fx.SCHEMES)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_quantize_writes_what_quantize_makes(capsys, text, tmp_path, method):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = tmp_path / "float", tmp_path / "int4"
    saved_model(source)
    seen = ["--method-text", text, "--method-tokens", 160] if method in ("gptq", "awq") else []
    given = ["--scheme", "w4a16-group,group_size=16", "--method", method, *seen]
    code, _, err = run(capsys, "quantize", source, out, *given)
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"][:160])
    batches = [{"input_ids": ids[None], "use_cache": False}] if seen else None
    int8fx.quantize_(model, method=method, batches=batches, scheme="w4a16-group", group_size=16)
    read = AutoModelForCausalLM.from_pretrained(out)
    for path, weight in model.named_parameters():
        other = read.get_parameter(path)
        assert type(weight) is type(other)
        if isinstance(weight, int8fx.QuantizedWeight):
            assert weight.options == other.options
            assert torch.equal(weight.dequantize(), other.dequantize()), path


def test_quantize_refuses_a_model_that_is_quantised(capsys, text, tmp_path):
    saved_model(tmp_path / "float")
    given = ["--scheme", "w4a16-group,group_size=16", "--method", "hqq"]
    assert run(capsys, "quantize", tmp_path / "float", tmp_path / "int4", *given)[0] == 0
    code, _, err = run(capsys, "quantize", tmp_path / "int4", tmp_path / "again", *given)
    assert code != 0 and "give a float model" in err[-1]


def test_evaluate_has_a_line_for_each_method(capsys, text, tmp_path):
    saved_model(tmp_path / "float")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{index * 7 % 100}" for index in range(300)))
    scheme = "w4a16-group,group_size=16"
    methods = [word for name in ("rtn", "gptq") for word in ("--method", name)]
    given = ["--text", text, "--windows", 1, "--length", 64, "--scheme", scheme, *methods]
    code, printed, err = run(
        capsys, "evaluate", tmp_path / "float", *given, "--method-text", other, "--json"
    )
    assert code == 0, err
    found = json.loads(printed)["accuracies"]
    assert list(found) == ["float, as loaded", f"{scheme}, gptq", scheme]
    assert 0 < found[f"{scheme}, gptq"]["mean_kl"] != found[scheme]["mean_kl"] > 0
