"""What limits a kernel: Nsight Compute's counters of a few launches, where the machine allows it."""

import csv
import io
import subprocess
import sys

from gpu_day.process import Run
from gpu_day.rehearsal import gpu_operators
from gpu_day.sanitizer import OURS, find
from gpu_day.shapes import EPS, THRESHOLD, activation, operands

METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
)
_MOST_LAUNCHES = 12
_ROWS = (4096, 16)


def counters(run: Run) -> None:
    """A line a launch; a machine that counts nothing says why."""
    program = find("ncu")
    if program is None:
        run.say(missing="ncu")
        if not run.rehearses:
            return
    profiler = [
        program or "", "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS),
        "-k", f"regex:{OURS}", "-c", str(_MOST_LAUNCHES),
    ] if program else []  # fmt: skip
    command = [*profiler, *run.command("counted")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    (run.out / "ncu.csv").write_text(done.stdout)
    launches = by_launch(done.stdout)
    for kernel, found in launches:
        run.say(kernel=kernel, counters=found)
    if not launches:
        run.say(missing="counters", output=(done.stdout + done.stderr)[-400:])
    sys.exit(done.returncode)


def by_launch(printed: str) -> list[tuple[str, dict[str, float]]]:
    """What ncu's CSV says of each launch: its kernel, and a number for each metric."""
    text = "\n".join(line for line in printed.splitlines() if line.startswith('"'))
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        _, numbers = found.setdefault(row["ID"], (row["Kernel Name"], {}))
        value = row["Metric Value"].replace(",", "")
        if value.replace(".", "", 1).isdigit():
            numbers[row["Metric Name"]] = float(value)
    return list(found.values())


def counted(run: Run) -> None:
    """One norm and linears for each layer, at many rows and at few."""
    torch = run.place.torch()
    gpu_operators()
    half = torch.float16
    for layer in run.place.layers[-2:]:
        linears = operands(torch, layer.widths, layer.K, half)
        for M in _ROWS if not run.rehearses else (9,):
            x, weight = activation(torch, M, layer.K, half), torch.ones(layer.K, dtype=half)
            torch.ops.int8fx.normed_linears_gpu(
                x, None, "rms", weight, None, EPS, THRESHOLD, "column", *linears
            )
    run.place.synchronize()
