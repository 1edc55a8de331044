"""benchmarks/gpu.py: the GPU day is rehearsed here, and its reader reads made-up lines."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu_day import acceptance, comparison, contenders, counters, lines, reader
from gpu_day.driver import Driver
from gpu_day.process import Run, in_shards
from gpu_day.shapes import CASES
from gpu_day.steps import BY_NAME, PARTS, SECONDS_OF_A_PART, STEPS, Step

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a GPU, and this machine has one")
def test_the_whole_day_is_rehearsed(tmp_path):
    """Every step ends, finds no fault and says what it would on a GPU; then all of it is read."""
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*/log.txt"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:] + log
    found = lines.read(tmp_path)
    assert lines.done(found) == {step.name for step in STEPS}
    assert not [line for line in found if line.get("ok") is False]
    for step in STEPS:
        said = [line for line in lines.of_step(found, step.name) if not line.get("errors")]
        assert said and not [line for line in said if "error" in line], step.name
    assert sum(line["ok"] for line in lines.of_step(found, "cases")) == 6
    outcomes = [line["outcome"] for line in lines.of_step(found, "tests")]
    assert len(outcomes) >= 3 and set(outcomes) == {"passed"}
    page = (tmp_path / reader.PAGE).read_text()
    assert page.startswith("# LLM.int8() on a GPU: rehearsed, not measured")
    assert "## The model against the measurement" in page and "## Tiles" in page
    (table,) = (tmp_path / reader.TABLES).glob("*.json")
    assert json.loads(table.read_text())["products"]
    with pytest.raises(ValueError, match="this is a rehearsal, and"):
        reader.write([tmp_path], ROOT)


def test_a_part_takes_less_than_seven_minutes():
    for part in PARTS:
        assert sum(step.seconds for step in STEPS if part in step.part) < SECONDS_OF_A_PART
    assert 300 <= len(list(CASES)) <= 400
    assert len({dataclasses.astuple(case) for case in CASES}) == len(list(CASES))


class Toy(Driver):
    """A driver whose steps are programs that a test wrote."""

    def command(self, step: Step) -> list[str]:
        return [sys.executable, "-c", step.function]


SAYS = """print('{"step": "toy", "found": 1}', flush=True); print("noise", flush=True)"""


def toy(function: str, name: str = "toy", seconds: int = 60) -> Step:
    return Step(name, "A", seconds, function)


def ends(driver: Driver) -> dict[str, str]:
    return {line["step"]: line["ended"] for line in driver.lines() if "ended" in line}


def test_a_step_that_crashes_or_takes_too_long_ends_alone(tmp_path):
    driver = Toy(tmp_path)
    slow = f"import time, subprocess, sys; {SAYS}; subprocess.run(['sleep', '600'])"
    steps = (toy(f"{SAYS}; raise SystemExit(3)", "dies"), toy(slow, "slow", 3), toy(SAYS, "fine"))
    began = time.monotonic()
    driver.run("A", steps)
    assert time.monotonic() - began < 60
    assert ends(driver) == {"dies": "failed", "slow": "timed out", "fine": "done"}
    assert len(list(lines.of_step(driver.lines(), "toy"))) == 3  # what was said before is kept
    assert "noise" in (tmp_path / "log.txt").read_text()


def test_what_is_done_is_left_out_and_what_failed_is_run_again(tmp_path):
    steps = (toy(SAYS, "fine"), toy("raise SystemExit(1)", "dies"))
    first = Toy(tmp_path / "first")
    first.run("A", steps)
    again = Toy(tmp_path / "second", resumed=tmp_path / "first")
    again.run("A", (*steps, toy(SAYS, "new")))
    assert [line["step"] for line in lines.read(tmp_path / "second") if "ended" in line] == [
        "dies",
        "new",
    ]
    assert ends(again) == {"fine": "done", "dies": "failed", "new": "done"}
    again.run("B", steps)
    assert ends(again)["dies"] == "failed"  # of another part: it was not run


class Shards(Run):
    """A step whose process, on its first visit, dies at item 2 of its share."""

    def command(self, step=None, *more):
        code = (
            "import json, os, sys\n"
            "after = int(sys.argv[sys.argv.index('--after') + 1])\n"
            "for n in range(after, 4):\n"
            "    print(json.dumps({'step': 'toy', 'begins': n}), flush=True)\n"
            "    if n == 2: print('illegal access'); sys.stdout.flush(); os._exit(7)\n"
            "    print(json.dumps({'step': 'toy', 'item': n}), flush=True)\n"
        )
        return [sys.executable, "-c", code, *more]


def test_a_share_goes_on_behind_the_item_that_killed_its_process(capfd, tmp_path):
    assert not in_shards(Shards("toy", tmp_path, True), 1)
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["item"] for line in said if "item" in line] == [0, 1, 3]
    (fault,) = [line for line in said if line.get("ok") is False]
    assert fault["died"]["begins"] == 2 and fault["code"] == 7
    assert "illegal access" in fault["output"]


def test_processes_share_items_and_each_is_somebodys():
    shares = [Run("toy", Path(), True, (number, 3)) for number in range(3)]
    given = [[item for _, item in run.share(range(10))] for run in shares]
    assert sorted(itertools.chain(*given)) == list(range(10))
    assert list(Run("toy", Path(), True, (1, 3), after=2).share(range(10))) == [(2, 7)]


def test_lines_are_json_whatever_was_found():
    line = lines.text("toy", error=float("nan"), us={1: float("inf"), 2: (1.5, None)})
    assert json.loads(line) == {"step": "toy", "error": None, "us": {"1": None, "2": [1.5, None]}}
    assert lines.is_line(line)


def test_a_step_that_was_run_again_has_said_what_its_last_run_said():
    first, second = ({"step": "toy", "found": n} for n in (1, 2))
    died, done = ({"step": "toy", "ended": how} for how in ("failed", "done"))
    other = {"step": "other", "found": 3}
    assert lines.latest([first, died, other, second, done]) == [second, done, other]
    assert lines.latest([first, died, second]) == [second]


def test_a_file_that_was_cut_short_is_read_and_another_is_not(tmp_path):
    path = tmp_path / lines.FILE
    path.write_text(lines.text("toy", found=1) + '{"step": "to')
    assert lines.read(tmp_path) == [{"step": "toy", "found": 1}]
    path.write_text("no line\n" + lines.text("toy"))
    with pytest.raises(ValueError, match="line 1 is no JSON: no line"):
        lines.read(path)


def test_a_contender_that_is_not_installed_is_left_out():
    assert (
        contenders.missing("torchao", lambda name: None) == "torchao is not installed, and not compared"
    )
    assert contenders.missing("torchao", lambda name: name) is None


def test_counters_are_read_launch_by_launch():
    printed = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Value"\n'
        '"0","gemm_kernel","time","1,234.5"\n"0","gemm_kernel","stalls","n/a"\n'
        '"1","norm_kernel","time","7"\n'
    )
    assert counters.by_launch(printed) == [
        ("gemm_kernel", {"time": 1234.5}),
        ("norm_kernel", {"time": 7.0}),
    ]
    assert counters.by_launch("==ERROR== no permission") == []


MACHINE = {
    "step": "machine", "device": "NVIDIA H200", "arch": "sm_90", "processors": 132, "driver": "580.65",
    "state": {"clocks.sm": "1980 MHz"}, "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}  # fmt: skip
TILE = {"block_m": 128, "block_n": 128, "block_k": 128, "num_warps": 8, "num_stages": 3}
OTHER = TILE | {"num_warps": 4}
ROWS = {"block_n": 32, "block_k": 256, "num_warps": 4, "num_stages": 4}


def day(**faster: float) -> list[dict]:
    """A day on which everything just met what it has to; ``faster`` by a factor."""
    by = dict.fromkeys(("product", "linears", "decode", "decoder"), 1.0001) | faster
    M, N, K = 4096, 28672, 4096
    product = 2 * M * N * K / 900e6 / by["product"]
    tiles = {json.dumps(TILE): product + 40, json.dumps(OTHER): product + 60, "alone": product}
    found = [MACHINE, {"step": "tiles", "layer": "gate/up", "M": M, "N": N, "K": K, "us": tiles}]
    least = {"gate/up": 1.2, "q/k/v": 1.1, "down": 1.1, "o": 1.0}
    for layer, ratio in least.items():
        us = {"fp16": 130.0, "fp16 joined": 120.0, "bf16": 125.0}
        us["column fp16"] = 120 / ratio / by["linears"]
        found.append({"step": "linears", "layer": layer, "M": M, "us": us})
        few = {"fp16": 15.0, "bf16 joined": 15.5, "column fp16": 10.0 / by["decode"]}
        found.append({"step": "decodes", "layer": layer, "M": 1, "N": N, "K": K, "us": few})
    for M, took in ((1, 8.0), (4, 9.0)):
        kind = {"layer": "o", "M": M, "N": N, "K": K, "kind": "rows 16", "us": {json.dumps(ROWS): took}}
        found.append({"step": "decodes", "way": "token", **kind})
    for who, factor in (("bf16", 1.0), ("column", by["decoder"])):
        prefill, step = (110.0, 135.0) if who == "bf16" else (100 / factor, 100 / factor)
        us = {"prefill": prefill, "decode 1": step}
        found.append({"step": "decoder", "who": who, "us": us, "peak_GiB": 4.5})
    return found


def verdicts(found: list[dict]) -> list[str]:
    return [criterion.verdict(found).split(", ")[-1] for criterion in acceptance.CRITERIA]


def test_a_day_is_held_against_what_it_has_to_show():
    every = len(acceptance.CRITERIA)
    assert verdicts(day()) == ["met"] * every
    slow, fast = (dict.fromkeys(("product", "linears", "decode", "decoder"), f) for f in (0.9, 1.4))
    assert verdicts(day(**slow)) == ["missed"] * every
    assert verdicts(day(**fast)) == ["aim reached"] * every
    assert verdicts([MACHINE]) == ["not measured"] * every
    rows = acceptance.page(day()).splitlines()[-every:]
    assert rows[0] == "| product of gate/up, M = 4096 | 900 TOPS | 1,150 TOPS | 900 TOPS, met |"


def test_a_day_is_read_into_a_page_and_a_table_of_tiles(tmp_path):
    from int8fx.kernels.gpu.configs import DecodeConfig, GemmConfig
    from int8fx.kernels.gpu.tile_tables import load

    fault = {"step": "cases", "ok": False, "case": {"M": 9}, "error": 0.5}
    found = [*day(), fault, {"step": "cases", "ended": "failed", "code": 1, "seconds": 51.3}]
    found = [line for line in found if line["step"] != "tiles" or line["M"] == 4096]
    (tmp_path / lines.FILE).write_text("".join(json.dumps(line) + "\n" for line in found))
    text = reader.page(found, model=lambda line, tile: float(tile["num_warps"]))
    assert "measured on NVIDIA H200" in text and "clocks.sm 1980 MHz" in text
    assert "| cases | failed | 51.3 | 1 | 1 |" in text and '"M": 9' in text
    assert "| graphs | not run |  | 0 |  |" in text
    assert "| gate/up, M = 4096 | 2 |  | 2 % |" in text  # by the model the one with fewer warps
    table = reader.tables.measured(found)
    assert table.products == {(None, 28672, 4096): GemmConfig(**TILE)}
    assert table.decodes == {("rows 16", 28672, 4096): DecodeConfig(**ROWS)}
    assert table.us[("rows 16", 28672, 4096)] == 9.0  # of the most rows
    path = tmp_path / reader.TABLES
    path.mkdir(parents=True)
    (path / "h200.json").write_text(table.to_json())
    with pytest.raises(ValueError, match="not of NVIDIA H200"):
        load("NVIDIA H200", "sm_100", path)


def test_lines_of_no_known_gpu_are_not_read(tmp_path):
    (tmp_path / lines.FILE).write_text(lines.text("cases", ok=True))
    with pytest.raises(ValueError, match="no line of the step 'machine'"):
        reader.write([tmp_path], tmp_path)


def test_the_model_is_judged_by_the_order_that_it_gives():
    assert comparison.spearman((1.0, 2.0, 3.0), (10.0, 20.0, 21.0)) == 1
    assert comparison.spearman((1.0, 2.0, 3.0), (3.0, 2.0, 1.0)) == -1
    assert comparison.spearman((1.0, 2.0), (1.0, 2.0)) is None
    us = {json.dumps(TILE | {"num_warps": n}): time for n, time in ((4, 12.0), (8, 10.0), (16, 14.0))}
    line = {"step": "tiles", "layer": "o", "M": 64, "N": 1, "K": 1, "us": us | {"alone": 1.0}}
    (right,) = comparison.compared([line], lambda line, tile: abs(tile["num_warps"] - 7.0))
    assert (right.tiles, right.lost) == (3, 0.0)
    (wrong,) = comparison.compared([line], lambda line, tile: -tile["num_warps"])
    assert wrong.lost == pytest.approx(0.4)
    assert not list(comparison.compared([line], lambda line, tile: None))


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "say A, B, read"), (["A"], "say --out DIR"), (["read"], "takes a folder")],
)
def test_the_command_says_what_it_lacks(given, message):
    command = [sys.executable, "benchmarks/gpu.py", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_every_step_has_a_function():
    for step in BY_NAME.values():
        module, function = step.function.split(":")
        source = (ROOT / "benchmarks" / "gpu_day" / f"{module}.py").read_text()
        assert f"def {function}(run: Run) -> None:" in source, step.name
