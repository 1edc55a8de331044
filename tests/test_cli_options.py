"""How to quantise, in the words of the command line: the same for every command, and in a file."""

import inspect
import itertools
import json
import os
import subprocess
import sys

import pytest
import typer.main

import int8fx
from int8fx.cli.app import app, main
from int8fx.cli.asked import PARAMETERS, Asked
from int8fx.errors import UserError
from int8fx.testing.toy_llama import saved_model

QUANTISING = ("demo", "bench", "evaluate", "explain", "quantize", "suggest", "compile")
# These take files of other systems, or what int8fx compile made, and no name on the hub.
OF_FILES = {"inspect": "path", "convert": "source", "run": "directory"}
COMMANDS = typer.main.get_command(app).commands


def run(capsys, *arguments) -> tuple[int, str, list[str]]:
    code = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTISING)
def test_every_command_that_quantises_takes_the_same_options(name):
    assert {each.name for each in COMMANDS[name].params} >= PARAMETERS.keys()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_model_is_the_first_argument_and_switches_have_no_type(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, shown, _ = run(capsys, name, "--help")
    assert code == 0 and max(map(len, shown.splitlines())) <= 80
    assert "<bool>" not in shown and "BOOLEAN" not in shown and "[[" not in shown
    arguments = [each.name for each in COMMANDS[name].params if each.param_type_name == "argument"]
    assert arguments[0] == OF_FILES.get(name, "model")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_line_of_help_ends_at_the_edge_of_the_terminal(capsys, monkeypatch, name):
    """Each line of a paragraph is too long for the next line's first word."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(capsys, name, "--help")[1].partition("╭")[0].splitlines()
    for line, following in itertools.pairwise(each.strip() for each in shown):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > 78, line


def test_a_shell_completes_commands_and_schemes():
    def completed(words: str) -> str:
        count = len(words.split(" ")) - 1
        asked = {"_INT8FX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        done = subprocess.run(
            [sys.executable, "-c", "from int8fx.cli.app import main; main([])"],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    assert completed("int8fx exp").split() == ["explain"]
    assert completed("int8fx explain --scheme w8a16-").split() == ["w8a16-group"]


# --- what is said before a model is loaded --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "--plot", "out.gif"], ["--plot out.gif", ".png, .svg, .pdf"]),
        (["explain", "--html", "page.txt"], ["--html page.txt", ".html"]),
        (["calibrate", "--out", "columns.txt"], ["--out columns.txt", ".json"]),
        (["suggest", "--kl", "1", "--out", "options"], ["--out options", ".json"]),
        (["suggest", "--kl", "0.01", "--memory", "99"], ["--kl 0.01", "--memory 99", "two budgets"]),
        (["suggest", "--kl", "1", "--calibration", "c.json"], ["--calibration c.json", "none"]),
        (["bench", "./model", "--no-model"], ["MODEL ./model", "--no-model"]),
        (["explain", "--scheme", "w8a16", "--scheme", "llm.int8"], ["--scheme", "2 times", "one"]),
        (["explain", "--scheme", "w8a16,threshold=3"], ["'threshold=3'", "allowed: none"]),
        (["explain", "--rule", "*.mlp.*=llm.int8,thresh=3"], ["'thresh=3'", "threshold=..."]),
        (["evaluate", "--scheme", "w8a16", "--threshold", "3"], ["--threshold 3", "none of w8a16"]),
        (["explain", "--options", "nowhere.json"], ["--options", "nowhere.json"]),
        (["explain", "--skip", "+a", "--skip", "b"], ["'skip'", "begin with '+'"]),
        (["explain", "--calibration", "no.json"], ["--calibration no.json: no such file"]),
        *(
            ([*command, "--scheme", "llm.int8,threshold=x"], ["--scheme llm.int8", "'x' (str)", ">= 0"])
            for command in (["evaluate"], ["suggest", "--kl", "1"], ["bench", "--no-model"], ["demo"])
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    capsys, monkeypatch, tmp_path, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "c.json").write_text("{}")
    monkeypatch.setattr("int8fx.bench.models.load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("int8fx.bench.smollm2.load", lambda *_: pytest.fail("it was loaded"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert [word for word in words if word not in err[-1]] == [], err[-1]


def test_a_file_that_is_no_options_is_named(tmp_path):
    file = tmp_path / "options.json"
    for content in ("[1]", "no JSON"):
        file.write_text(content)
        with pytest.raises(UserError, match=f"--options {file}: no options"):
            Asked(options_file=file).options()


# --- what they come to ----------------------------------------------------------------------------


def test_what_is_given_goes_before_the_file(tmp_path):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"threshold": 3.0, "rules": [["a", "w8a16"]], "skip": ["b"]}))
    asked = Asked(rule=["c=llm.int8,threshold=4"], threshold=5.0, options_file=file)
    rules = [("c", "llm.int8", {"threshold": 4}), ["a", "w8a16"]]
    assert asked.options() == {"threshold": 5.0, "rules": rules, "skip": ["b"]}


def test_contenders_take_what_they_read():
    asked = Asked(scheme=["llm.int8,decomposition=token", "w8a16"], threshold=5.0, skip=["x"])
    assert asked.contenders([]) == {
        "llm.int8,decomposition=token": {
            "scheme": "llm.int8",
            "decomposition": "token",
            "threshold": 5.0,
            "skip": ["x"],
        },
        "w8a16": {"scheme": "w8a16", "skip": ["x"]},
    }
    assert list(Asked(threshold=3.0).contenders(["llm.int8", "w8a16"])) == ["llm.int8", "w8a16"]
    assert list(Asked(rule=["a=w8a16"]).contenders(["w8a16", "absmax-row"])) == ["llm.int8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    saved_model(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{index * 37 % 128}" for index in range(64)))
    return folder


def test_suggest_writes_what_every_command_and_python_take(capsys, model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source, text, out = model / "model", ["--text", model / "text.txt"], tmp_path / "options.json"
    given = ["--scheme", "llm.int8", "--scheme", "w8a16", "--rule", "*.v_proj=absmax-vector"]
    given += ["--skip", "+*.o_proj", "--tokens", 32, "--kl", 1, "--out", out]
    code, printed, err = run(capsys, "suggest", source, *text, *given, "--json")
    assert code == 0, err
    options = int8fx.load_options(out)
    assert options == json.loads(json.dumps(json.loads(printed)["options"]))
    assert options["rules"][0] == ["*.v_proj", "absmax-vector", {}]
    assert options["skip"] == ["+*.o_proj"]
    measured = {each["path"].rpartition(".")[2] for each in json.loads(printed)["linears"]}
    assert measured == {"q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"}

    code, printed, err = run(
        capsys, "explain", source, *text, "--tokens", 32, "--options", out, "--json"
    )
    assert code == 0, err
    shown = {row["path"]: row["scheme"] for row in json.loads(printed)["rows"]}
    of_kind = {kind: {v for k, v in shown.items() if k.endswith(kind)} for kind in ("v_proj", "o_proj")}
    assert of_kind == {"v_proj": {"absmax-vector"}, "o_proj": {""}}
    code, printed, err = run(
        capsys, "evaluate", source, *text, "--windows", 1, "--length", 32, "--options", out, "--json"
    )
    assert code == 0, err
    assert list(json.loads(printed)["accuracies"]) == ["float, as loaded", "options.json"]
    code, _, err = run(capsys, "quantize", source, tmp_path / "int8", "--options", out)
    assert code == 0, err

    read = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    made = int8fx.quantize_(AutoModelForCausalLM.from_pretrained(source), **options)
    schemes = {
        name: weight.choice.scheme.name
        for name, weight in read.named_parameters()
        if isinstance(weight, int8fx.QuantizedWeight)
    }
    assert {name for name in schemes if "v_proj" in name and schemes[name] == "absmax-vector"}
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, made(ids).logits)


def test_quantize_takes_rules_of_several_formats(capsys, model, tmp_path):
    from transformers import AutoModelForCausalLM

    rules = ["--rule", "*.mlp.*=w8a16-group,group_size=32", "--rule", "*.q_proj=int8-rotated,block=32"]
    code, printed, err = run(capsys, "quantize", model / "model", tmp_path / "int8", *rules)
    assert code == 0, err
    assert "in int8-rotated, llm.int8 and w8a16-group; the model takes" in " ".join(printed.split())
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").model.layers[1]
    of = {
        name: getattr(layer.get_submodule(name).weight, "choice", None)
        for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj")
    }
    assert [choice.scheme.name for choice in of.values()] == ["w8a16-group", "int8-rotated", "llm.int8"]
    assert of["mlp.up_proj"].settings.group_size == 32


def test_explain_shows_the_summary_first_and_alone(capsys, model):
    common = ["explain", model / "model", "--text", model / "text.txt", "--tokens", 16]
    code, whole, err = run(capsys, *common)
    assert code == 0, err
    code, summary, err = run(capsys, *common, "--summary")
    assert code == 0 and whole.startswith(summary.rstrip("\n"))
    assert "model.layers.0.mlp.up_proj" not in summary and "model.layers.*.mlp.up_proj" in summary
    legend = next(number for number, line in enumerate(whole.splitlines()) if "SQNR: dB" in line)
    assert "N x K" in "".join(whole.splitlines()[legend + 1 : legend + 3])
    bars = [line for line in err if "Running the model" in line or "Importing" in line]
    assert [line for line in bars if "15/15" in line or "2/2" in line] == bars and len(bars) == 2


def test_bench_without_a_model(monkeypatch):
    from int8fx.cli import bench

    linears = {1: {}}
    monkeypatch.setattr(bench, "_linears", lambda settings, progress: linears)
    settings = bench.Settings(64, 64, [1], {"w8a16": {"scheme": "w8a16"}}, 0.1, 8)
    outcome = bench.bench(settings, None)
    assert outcome.linears is linears and outcome.speeds == {}


def test_the_signature_of_a_command_is_what_typer_reads():
    parameters = inspect.signature(app.registered_commands[0].callback).parameters
    assert "asked" not in parameters and parameters.keys() >= PARAMETERS.keys()
