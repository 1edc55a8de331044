"""One linear, every contender, in one process and one run.

    python benchmarks/linear.py                                   # the table of the README
    python benchmarks/linear.py --shapes 4096x4096 --rows 1,512 --outliers 0,6,2%

Contenders run interleaved on bf16 activations, with as many copies of each weight as leave the cache.
Peers that are not installed are skipped by name (``pip install int8fx[bench]``).
"""

import json
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import Timing, interleaved
from torch import Tensor, nn

# (K, N) of the models' linears
SHAPES = {
    "4096x4096": (4096, 4096),
    "smollm2-135m attention": (576, 576),
    "smollm2-135m up": (576, 1536),
    "smollm2-135m down": (1536, 576),
    "llama-1b attention": (2048, 2048),
    "llama-1b up": (2048, 8192),
    "llama-1b down": (8192, 2048),
    "llama-3-8b up": (4096, 14336),
    "llama-3-8b down": (14336, 4096),
    "gpt2-xl up": (1600, 6400),
    "gpt2-xl down": (6400, 1600),
}
COLD_BYTES = 256 << 20
OUTLIER_SIZE = 20.0

Linears = list[Callable[[Tensor], Tensor]]


class Missing(Exception):
    """A peer that is not installed."""


class _One(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def compiled(linear: nn.Module, backend: str, **options: object) -> Callable[[Tensor], Tensor]:
    return torch.compile(_One(linear), backend=backend, dynamic=False, **options)


def eager(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return linear


def inductor(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return compiled(linear, "inductor")


def inductor_frozen(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Inductor at its best: autotuned templates, and weights packed by freezing."""
    return compiled(linear, "inductor", options={"max_autotune": True, "freezing": True})


def llmint8(**options: object) -> Callable[[nn.Linear], Callable[[Tensor], Tensor]]:
    return lambda linear: compiled(linear, "llmint8", options={"skip": [], **options})


def bitsandbytes(threshold: float) -> Callable[[nn.Linear], Callable[[Tensor], Tensor]]:
    def build(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        try:
            import bitsandbytes as bnb
        except ImportError as error:
            raise Missing("bitsandbytes") from error
        K, N = linear.in_features, linear.out_features
        peer = bnb.nn.Linear8bitLt(
            K, N, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        weight = linear.weight.detach().to(torch.float16)
        peer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return peer.to("cpu").eval()

    return build


def torchao(config: str) -> Callable[[nn.Linear], Callable[[Tensor], Tensor]]:
    def build(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        try:
            from torchao import quantization
        except ImportError as error:
            raise Missing("torchao") from error
        model = _One(nn.Linear(linear.in_features, linear.out_features, bias=False))
        model = model.to(torch.bfloat16).requires_grad_(False)
        model.linear.weight.copy_(linear.weight)
        quantization.quantize_(model, getattr(quantization, config)())
        return torch.compile(model, dynamic=False)

    return build


def quanto(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    try:
        from optimum.quanto import freeze, qint8, quantize
    except ImportError as error:
        raise Missing("optimum-quanto") from error
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    model = model.to(torch.bfloat16).requires_grad_(False)
    model[0].weight.copy_(linear.weight)
    quantize(model, weights=qint8, activations=None)
    freeze(model)
    return model


def torch_dynamic(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    model[0].weight.data.copy_(linear.weight)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return lambda x: quantized(x.float())


CONTENDERS: dict[str, Callable[[nn.Linear], Callable[[Tensor], Tensor]]] = {
    "bf16 eager": eager,
    "bf16 inductor": inductor,
    "bf16 inductor frozen": inductor_frozen,
    "llmint8 column": llmint8(),
    "llmint8 token": llmint8(decomposition="token"),
    "llmint8 threshold 0": llmint8(threshold=0),
    "bitsandbytes 6.0": bitsandbytes(6.0),
    "bitsandbytes 0.0": bitsandbytes(0.0),
    "torchao dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao weight-only": torchao("Int8WeightOnlyConfig"),
    "quanto weight-only": quanto,
    "torch dynamic": torch_dynamic,
}
BASELINE = "bf16 inductor"


def activations(M: int, K: int, outliers: str) -> Tensor:
    """bf16 rows with some columns of outliers: a count, or a share of K as ``2%``."""
    count = round(K * float(outliers[:-1]) / 100) if outliers.endswith("%") else int(outliers)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).clamp(-5, 5)
    columns = torch.randperm(K, generator=generator)[:count]
    x[:, columns] = OUTLIER_SIZE * (1 + x[:, columns].abs())
    return x.to(torch.bfloat16)


def measure(
    M: int, K: int, N: int, outliers: str, names: list[str], seconds: float
) -> tuple[dict[str, Timing], list[str]]:
    """The timings by contender, and the peers that are missing."""
    torch.compiler.reset()
    copies = max(1, min(8, COLD_BYTES // (2 * K * N)))
    x = activations(M, K, outliers)
    calls: dict[str, list[Callable[[], object]]] = {}
    missing = []
    for name in names:
        try:
            calls[name] = list(_cold(CONTENDERS[name], x, K, N, copies))
        except Missing as peer:
            missing.append(str(peer))
    return interleaved(calls, seconds=seconds), missing


def _cold(
    build: Callable[[nn.Linear], Callable[[Tensor], Tensor]], x: Tensor, K: int, N: int, copies: int
) -> Iterator[Callable[[], object]]:
    for copy in range(copies):
        torch.manual_seed(copy)
        linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        call = build(linear)
        yield lambda call=call: call(x)


def show(console: Console, title: str, rows: list[dict], names: list[str]) -> None:
    table = Table(title=title, caption=f"x: speed over {BASELINE}, same run; then GOP/s")
    table.add_column("contender", no_wrap=True)
    for row in rows:
        table.add_column(f"M={row['M']}", justify="right")
    for name in names:
        cells = []
        for row in rows:
            timing = row["timings"].get(name)
            if timing is None:
                cells.append("-")
                continue
            baseline = row["timings"].get(BASELINE, timing)
            gops = 2 * row["M"] * row["K"] * row["N"] / timing.median / 1e9
            cells.append(f"{baseline.median / timing.median:.2f}x {gops:.0f}")
        if any(cell != "-" for cell in cells):
            table.add_row(name, *cells)
    console.print(table)


def machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu.get_capabilities().get("amx_int8", False)
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{capability}{' with AMX' if amx else ''}, torch {torch.__version__}"
    )


def main(
    shapes: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(SHAPES)}")] = "4096x4096",
    rows: Annotated[str, typer.Option(help="M, comma-separated")] = "1,4,16,128,512,2048",
    outliers: Annotated[str, typer.Option(help="columns: counts, or a share of K as 2%")] = "6",
    contenders: Annotated[str, typer.Option(help="comma-separated names, or all")] = "all",
    seconds: Annotated[float, typer.Option(help="measuring, for each contender and shape")] = 1.0,
    threads: int = 2,
    output: Annotated[Path | None, typer.Option(help="also write JSON here")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw a roofline (PNG) here")] = None,
) -> None:
    torch.set_num_threads(threads)
    names = list(CONTENDERS) if contenders == "all" else contenders.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(f"unknown: {unknown}; allowed: {list(CONTENDERS)}")
    console = Console()
    console.print(machine())
    results: list[dict] = []
    absent: set[str] = set()
    cases = [(s, o) for s in shapes.split(",") for o in outliers.split(",")]
    sizes = [int(M) for M in rows.split(",")]
    with torch.no_grad(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(sizes))
        for shape, outlier in cases:
            K, N = SHAPES[shape]
            found = []
            for M in sizes:
                progress.update(task, description=f"{shape}, M={M}, {outlier} outlier columns")
                timings, missing = measure(M, K, N, outlier, names, seconds)
                absent.update(missing)
                found.append(
                    {"shape": shape, "M": M, "K": K, "N": N, "outliers": outlier, "timings": timings}
                )
                progress.advance(task)
            show(console, f"{shape} (K={K}, N={N}), {outlier} outlier columns", found, names)
            results += found
    for peer in sorted(absent):
        console.print(f"not installed, skipped: {peer}")
    summarise(console, results)
    if output:
        output.write_text(json.dumps({"machine": machine(), "results": _plain(results)}, indent=1))
    if plot:
        draw(results, plot)


def summarise(console: Console, results: list[dict]) -> None:
    """Geometric means over the shapes, by M."""
    for name in ("llmint8 column", "llmint8 token"):
        for M in sorted({row["M"] for row in results}):
            ratios = [
                row["timings"][BASELINE].median / row["timings"][name].median
                for row in results
                if row["M"] == M and {name, BASELINE} <= row["timings"].keys()
            ]
            if len(ratios) > 1:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                console.print(f"{name}, M={M}: {mean:.2f}x over {BASELINE}, least {min(ratios):.2f}x")


def _plain(results: list[dict]) -> list[dict]:
    return [
        {**row, "timings": {name: vars(timing) for name, timing in row["timings"].items()}}
        for row in results
    ]


def draw(results: list[dict], path: Path) -> None:
    """GOP/s over arithmetic intensity (operations per byte of int8 weight), both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    for name in dict.fromkeys(name for row in results for name in row["timings"]):
        points = sorted(
            (row["M"], 2 * row["M"] * row["K"] * row["N"] / row["timings"][name].median / 1e9)
            for row in results
            if name in row["timings"]
        )
        ours = name.startswith("llmint8")
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            ms=4,
            lw=2 if ours else 1,
            label=name,
            ls="-" if ours else "--",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rows M (operations per byte of weight: 2M)",
        ylabel="GOP/s",
        title=f"One linear, bf16 activations\n{machine()}",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
