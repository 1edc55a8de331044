"""Is it right? The kernels on tiny shapes under compute-sanitizer: bounds, races, barriers."""

import glob
import os
import shutil
import subprocess
import sys

from gpu_day.process import Run
from gpu_day.rehearsal import gpu_operators
from gpu_day.shapes import EPS, THRESHOLD, WAYS, activation, operands

TOOLS = ("memcheck", "racecheck", "synccheck")
OURS = "gemm_kernel|decode_kernel|quantize_gather_kernel|norm_kernel"
_RAN = "sanitized: ran"
_CLEAN = ("0 errors", "0 hazards")
_SHAPES = (
    (1, (33, 7), 256),
    (9, (81,), 1024),
    (40, (96, 31), 160),
    (40, (256,), 1024),
    (1536, (512,), 160),
)


def sanitizer(run: Run) -> None:
    """Each tool in turn; a machine without them says so, and fails the step."""
    program = find("compute-sanitizer")
    if program is None and not run.rehearses:
        run.say(ok=False, missing="compute-sanitizer")
        sys.exit(1)
    clean = [_under(run, program, tool) for tool in TOOLS[: 1 if run.rehearses else None]]
    sys.exit(not all(clean))


def find(program: str) -> str | None:
    """A tool of CUDA's, on the path or where CUDA puts it."""
    usual = [
        *sorted(glob.glob(f"/usr/local/cuda*/bin/{program}")),
        *glob.glob(f"/opt/nvidia/*/*/{program}"),
    ]
    return shutil.which(program) or next(iter(usual[::-1]), None)


def _under(run: Run, program: str | None, tool: str) -> bool:
    command = run.command("sanitized")
    if program is not None:
        only = ["--kernel-regex", f"kns={OURS}"]
        command = [program, "--tool", tool, *only, "--print-limit", "20", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    summary = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    ran = _RAN in done.stdout
    ok = ran and (program is None or any(clean in line for line in summary for clean in _CLEAN))
    under = tool if program is not None else "no tool: a rehearsal"
    run.say(ok=ok, tool=under, ran=ran, summary=summary, output="" if ok else done.stdout[-600:])
    return ok


def sanitized(run: Run) -> None:
    """Every kernel at few shapes."""
    torch = run.place.torch()
    gpu_operators()
    half = torch.float16
    for M, widths, K in _SHAPES[: 2 if run.rehearses else None]:
        linears = operands(torch, widths, K, half, bias=True)
        x, weight = activation(torch, M, K, half), torch.ones(K, dtype=half)
        for way in WAYS:
            torch.ops.int8fx.int8_linears_gpu(x, THRESHOLD, way, *linears)
            torch.ops.int8fx.normed_linears_gpu(
                x, None, "rms", weight, None, EPS, THRESHOLD, way, *linears
            )
    run.place.synchronize()
    print(_RAN)
