"""What the machine is, and how fast it can be at most."""

import subprocess
from typing import Any

from gpu_day.process import Run

_ASKED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def machine(run: Run) -> None:
    """Its name, driver, clocks and versions."""
    torch = run.place.torch()
    import platform

    import transformers
    import triton

    from int8fx.kernels.gpu import configs

    gpu = torch.cuda.get_device_properties(0)
    state = _smi()
    run.say(
        device="a rehearsal on a CPU" if run.rehearses else gpu.name,
        arch=configs.architecture(torch.device(run.place.device)),
        processors=gpu.multi_processor_count,
        l2=gpu.L2_cache_size,
        memory=gpu.total_memory,
        driver=state.get("driver_version", ""),
        state=state,
        versions={
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


def _smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader", "--id=0"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(_ASKED.split(","), map(str.strip, printed.strip().split(",")), strict=False))


def limits(run: Run) -> None:
    """Bytes a second of a copy, and operations a second of torch's own products."""
    run.say(copy_TB_s=_copy(run))
    for M, N, K in run.place.limits:
        run.say(M=M, N=N, K=K, TOPS={kind: _tops(run, kind, M, N, K) for kind in KINDS})
    run.say(state=_smi())


def _copy(run: Run) -> float:
    torch = run.place.torch()
    source = torch.empty(run.place.copied, dtype=torch.uint8)
    target = torch.empty_like(source)
    us = run.place.microseconds(lambda: target.copy_(source))
    return round(2 * source.numel() / us / 1e6, 3)


KINDS = ("bf16", "fp16", "int8")


def _tops(run: Run, kind: str, M: int, N: int, K: int) -> float:
    us = run.place.microseconds(product(run.place.torch(), kind, M, N, K))
    return round(2 * M * N * K / us / 1e6, 1)


def product(torch: Any, kind: str, M: int, N: int, K: int) -> Any:
    """``x @ wᵀ`` of torch: cuBLAS, or for int8 ``torch._int_mm``."""
    if kind == "int8":
        x, w = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((M, K), (N, K)))
        return lambda: torch._int_mm(x, w.t())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    x, w = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    return lambda: x @ w.t()
