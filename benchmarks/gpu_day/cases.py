"""Is it right? Linears of awkward shapes against the reference, each five times, for the same bits."""

import dataclasses
import sys
from typing import Any

from gpu_day.process import Run, in_shards
from gpu_day.rehearsal import gpu_operators
from gpu_day.shapes import EPS, Case, activation, operands

# Of the norm of the difference, relative: roundings of the result, and a few of x_int8 on a tie.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.2e-2, "float32": 1e-4}
_REPEATS = 4
_LEFTOVERS = (1 << 20, 1 << 24)  # elements of NaN in what the next allocation is given


def cases(run: Run) -> None:
    """All cases, dealt out to processes, since compiling is what takes time."""
    if run.shard != (0, 1):
        return _share(run)
    sys.exit(not in_shards(run, run.place.processes))


def _share(run: Run) -> None:
    torch = run.place.torch()
    gpu_operators()
    torch.backends.cuda.matmul.allow_tf32 = False
    for number, case in run.share(run.place.cases):
        run.say(begins=number, case=dataclasses.asdict(case))
        fault = check(run, torch, case)
        run.say(ok=fault is None, case=dataclasses.asdict(case), **(fault or {}))


def check(run: Run, torch: Any, case: Case) -> dict[str, Any] | None:
    """What is wrong with a case, or None. An error of the GPU ends the process."""
    dtype = getattr(torch, case.dtype)
    linears = operands(torch, case.widths, case.K, dtype, case.bias)
    x = activation(torch, case.M, case.K, dtype)
    for size in () if run.rehearses else _LEFTOVERS:
        torch.full((size,), float("nan"))
    h, call = _call(torch, case, x, linears)
    ys, again = call(), [call() for _ in range(_REPEATS)]
    run.place.synchronize()
    same = all(torch.equal(y, z) for other in again for y, z in zip(ys, other, strict=True))
    error = max(_errors(torch, case, h, ys, linears))
    if error < TOLERANCE[case.dtype] and same:  # NaN is not
        return None
    return {"error": error, "same_bits": same}


def _call(torch: Any, case: Case, x: Any, linears: tuple) -> tuple[Any, Any]:
    """What the linears read, and the operator."""
    if not case.norm:
        run = torch.ops.int8fx.int8_linears_gpu
        return x, lambda: run(x, case.threshold, case.way, *linears)
    from int8fx.kernels.gpu.norm import norm_statistics, normalized_reference

    weight = 1 + torch.rand(case.K, dtype=x.dtype)
    bias = torch.randn(case.K, dtype=x.dtype) if case.norm.endswith("bias") else None
    h = normalized_reference(x, *norm_statistics(x, case.norm, EPS), weight, bias, case.norm)
    normed = torch.ops.int8fx.normed_linears_gpu
    return h, lambda: normed(x, None, case.norm, weight, bias, EPS, case.threshold, case.way, *linears)


def _errors(torch: Any, case: Case, h: Any, ys: list[Any], linears: tuple) -> list[float]:
    from int8fx.kernels.gpu.decode import quantized_linear_reference

    weights, scales, biases = linears
    found = []
    for y, *linear in zip(ys, weights, scales, biases or [None] * len(ys), strict=True):
        expected = quantized_linear_reference(h, case.threshold, case.way, *linear).double()
        size = expected.norm().clamp_min(1e-30)
        found.append(float((y.double() - expected).norm() / size))
    return found
