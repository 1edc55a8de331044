"""The CPU kernel of int8_linear, per instruction set, against oneDNN's int8 linear and bf16.

    python benchmarks/kernel_cpu.py                               # GOP/s
    python benchmarks/kernel_cpu.py --shapes 576x1536 --rows 1 --outliers 0 --isas avx512_vnni
    python benchmarks/kernel_cpu.py --cold                        # weights from memory

Only the multiplication is timed: rows come quantised. oneDNN's has no outliers and its weight is
packed once, too. 2 · M · N · K operations a call; in brackets the ratio to oneDNN.
"""

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from int8fx.bench.timing import interleaved
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.ops import int8_linear as ops

CACHE_BYTES = 256 << 20  # more than a last-level cache holds
Calls = list[Callable[[], object]]


def outlier_columns(spec: str, K: int) -> Tensor | None:
    """``"6"`` or ``"2%"`` of K columns, spread evenly."""
    count = round(float(spec[:-1]) / 100 * K) if spec.endswith("%") else int(spec)
    if count == 0:
        return None
    columns = torch.zeros(K, dtype=torch.bool)
    columns[torch.linspace(0, K - 1, count).long()] = True
    return columns


def int8fx_calls(M: int, weights: list[Tensor], outliers: str, isa: str) -> Calls:
    N, K = weights[0].shape
    columns = outlier_columns(outliers, K)
    x_int8 = torch.randint(-127, 128, (M, K), dtype=torch.int8)
    x_outlier = torch.randn(M, K, dtype=torch.bfloat16)
    x_outlier = x_outlier if columns is None else torch.where(columns, x_outlier, 0)
    x_scale, w_scale = torch.rand(M), torch.rand(N)

    def call(packed: Tensor) -> None:
        cpu.use_isa(isa)
        ops.int8_linear(x_int8, x_scale, x_outlier, columns, packed, w_scale, None)

    return [functools.partial(call, cpu.pack(weight)) for weight in weights]


def onednn_calls(M: int, weights: list[Tensor]) -> Calls:
    N, K = weights[0].shape
    x_uint8 = torch.randint(0, 256, (M, K), dtype=torch.uint8)
    w_scale, w_zero_points = torch.rand(N), torch.zeros(N, dtype=torch.int64)

    def call(packed: Tensor) -> None:
        torch.ops.onednn.qlinear_pointwise(
            x_uint8, 0.01, 128, packed, w_scale, w_zero_points, None, 1.0, 0, torch.bfloat16,
            "none", [], "",
        )  # fmt: skip

    packed = [torch.ops.onednn.qlinear_prepack(weight, None) for weight in weights]
    return [functools.partial(call, weight) for weight in packed]


def bf16_calls(M: int, weights: list[Tensor]) -> Calls:
    x = torch.randn(M, weights[0].shape[1], dtype=torch.bfloat16)
    return [functools.partial(F.linear, x, weight.to(torch.bfloat16)) for weight in weights]


def contenders(
    M: int, weights: list[Tensor], isas: list[str], outliers: list[str]
) -> Iterator[tuple[str, Calls]]:
    yield "oneDNN int8", onednn_calls(M, weights)
    yield "bf16", bf16_calls(M, weights)
    for isa in isas:
        for spec in outliers:
            yield f"{isa}, {spec} outliers", int8fx_calls(M, weights, spec, isa)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,576x1536", help="KxN,...")
    parser.add_argument("--rows", default="1,4,16,128,512,2048", help="M,...")
    parser.add_argument("--outliers", default="0,6,2%", help="columns of K, or percent")
    parser.add_argument("--isas", help="default: the best")
    parser.add_argument("--cold", action="store_true", help="weights that no cache holds")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement")
    options = parser.parse_args()
    if reason := cpu.load():
        raise SystemExit(f"no CPU kernel: {reason}")
    if options.threads:
        torch.set_num_threads(options.threads)
    isas = options.isas.split(",") if options.isas else ["auto"]

    console = Console()
    for shape in options.shapes.split(","):
        K, N = map(int, shape.split("x"))
        copies = 1 + CACHE_BYTES // (N * K) if options.cold else 1
        weights = [torch.randint(-127, 128, (N, K), dtype=torch.int8) for _ in range(copies)]
        table = Table(title=f"K {K}, N {N}, {torch.get_num_threads()} threads: GOP/s")
        table.add_column("M", justify="right")
        for row, M in enumerate(map(int, options.rows.split(","))):
            calls = dict(contenders(M, weights, isas, options.outliers.split(",")))
            timings = interleaved(calls, seconds=options.seconds)
            if row == 0:
                for name in timings:
                    table.add_column(name, justify="right")
            onednn = timings["oneDNN int8"].median
            table.add_row(
                str(M),
                *(
                    f"{2e-9 * M * N * K / timing.median:.0f} ({onednn / timing.median:.2f})"
                    for timing in timings.values()
                ),
            )
        console.print(table)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
