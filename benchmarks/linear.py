"""One linear, every contender, in one process and one run.

    python benchmarks/linear.py                                   # the table of the README
    python benchmarks/linear.py --shapes all --rows 1,512 --outliers 0,6,2%

Contenders run interleaved on bf16 activations. A call is a graph of many linears of the shape,
each with its own input: up to 16 rows as many as leave the cache, so that weights come from memory.
Peers that are not installed are skipped by name (``pip install int8fx[bench]``).
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import peaks
import torch
import typer
from figures import choose, plain
from peers import PEERS, converted
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from int8fx.bench.linears import (
    Build,
    Run,
    compiled,
    llmint8,
    measure,
)
from int8fx.bench.timing import machine

# (K, N) of the models' linears
SHAPES = {
    "smollm2-135m attention": (576, 576),
    "smollm2-135m up": (576, 1536),
    "smollm2-135m down": (1536, 576),
    "llama-1b attention": (2048, 2048),
    "llama-1b up": (2048, 8192),
    "llama-1b down": (8192, 2048),
    "llama-3-8b attention": (4096, 4096),
    "llama-3-8b up": (4096, 14336),
    "llama-3-8b down": (14336, 4096),
    "gpt2-xl attention": (1600, 1600),
    "gpt2-xl up": (1600, 6400),
    "gpt2-xl down": (6400, 1600),
}


def in_fp32(build: Build) -> Build:
    """The model and its input in fp32."""

    def convert(model: nn.Module) -> Run:
        call = build(model.float())
        return lambda xs: call([x.float() for x in xs])

    return convert


# Inductor at its best: autotuned templates, and weights packed by freezing.
FROZEN = {"max_autotune": True, "freezing": True}
CONTENDERS: dict[str, Build] = {
    "fp32 eager": in_fp32(lambda model: model),
    "fp32 inductor": in_fp32(compiled("inductor")),
    "bf16 eager": lambda model: model,
    "bf16 inductor": compiled("inductor"),
    "bf16 inductor frozen": compiled("inductor", options=FROZEN),
    "llmint8 column": llmint8(),
    "llmint8 token": llmint8(decomposition="token"),
    "llmint8 threshold 0": llmint8(threshold=0),
    "llmint8 w8a16": llmint8(scheme="w8a16"),
    "llmint8 rotated": llmint8(scheme="int8-rotated"),
    "llmint8 rotated 8 columns": llmint8(scheme="int8-rotated", columns=tuple(range(8))),
    "llmint8 w8a16 fp32": in_fp32(llmint8(scheme="w8a16")),
    **{name: converted(name) for name in PEERS},
}
BASELINE = "bf16 inductor"


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


def main(
    shapes: Annotated[
        str, typer.Option(help=f"comma-separated, or all: {', '.join(SHAPES)}")
    ] = "llama-3-8b attention",
    rows: Annotated[str, typer.Option(help="M, comma-separated")] = "1,4,16,128,512,2048",
    outliers: Annotated[str, typer.Option(help="columns: counts, or a share of K as 2%")] = "6",
    contenders: Annotated[str, typer.Option(help="comma-separated names, or all")] = "all",
    seconds: Annotated[float, typer.Option(help="measuring, for each contender and shape")] = 1.0,
    threads: int = 2,
    output: Annotated[Path | None, typer.Option(help="also write JSON here")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw a roofline (PNG) here")] = None,
) -> None:
    torch.set_num_threads(threads)
    names = choose("contenders", contenders, CONTENDERS)
    console = Console()
    console.print(machine())
    ceilings = peaks.measure(threads)
    console.print(str(ceilings))
    results: list[dict] = []
    absent: set[str] = set()
    cases = [(s, o) for s in choose("shapes", shapes, SHAPES) for o in outliers.split(",")]
    sizes = [int(M) for M in rows.split(",")]
    with torch.no_grad(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(sizes))
        for shape, outlier in cases:
            K, N = SHAPES[shape]
            found = []
            for M in sizes:
                progress.update(task, description=f"{shape}, M={M}, {outlier} outlier columns")
                builds = {name: CONTENDERS[name] for name in names}
                timings, missing = measure(M, K, N, outlier, builds, seconds)
                absent.update(missing)
                found.append(
                    {"shape": shape, "M": M, "K": K, "N": N, "outliers": outlier, "timings": timings}
                )
                progress.advance(task)
            show(console, f"{shape} (K={K}, N={N}), {outlier} outlier columns", found, names)
            results += found
    for peer in sorted(absent):
        console.print(f"not installed, skipped: {peer}")
    if any(name.startswith("llmint8") for name in names):
        summarise(console, results, ceilings)
    if output:
        found = {"machine": machine(), "peaks": plain(ceilings), "results": plain(results)}
        output.write_text(json.dumps(found, indent=1))
    if plot:
        draw(results, ceilings, plot)


def summarise(console: Console, results: list[dict], ceilings: peaks.Peaks) -> None:
    """Geometric means over the shapes and the least of them, by rows and outliers."""
    table = Table(title="Speed: geometric mean over the shapes (least)")
    table.add_column("contender", no_wrap=True)
    table.add_column("outliers")
    table.add_column("M", justify="right")
    measured = {name for row in results for name in row["timings"]}
    rivals = {rival: names for rival, names in RIVALS.items() if measured & set(names)}
    for rival in rivals:
        table.add_column(f"over {rival}", justify="right")
    if ceilings.int8_operations is not None:
        table.add_column("of the int8 peak", justify="right")
    cases = sorted({(row["outliers"], row["M"]) for row in results})
    for name in (name for name in CONTENDERS if name.startswith("llmint8")):
        for outliers, M in cases:
            rows = [
                row
                for row in results
                if (row["outliers"], row["M"]) == (outliers, M) and name in row["timings"]
            ]
            if rows:
                cells = [_over(rows, name, names) for names in rivals.values()]
                if ceilings.int8_operations is not None:
                    cells.append(_of_peak(rows, name, ceilings.int8_operations))
                table.add_row(name, outliers, str(M), *cells)
    console.print(table)


# Each is the best of these contenders, at every shape.
RIVALS = {
    "Inductor bf16, the better": ("bf16 inductor", "bf16 inductor frozen"),
    "bitsandbytes 6.0": ("bitsandbytes 6.0", "bitsandbytes 6.0 compiled"),
    "threshold 0": ("llmint8 threshold 0",),
    "column": ("llmint8 column",),
}


def _over(rows: list[dict], name: str, rivals: tuple[str, ...]) -> str:
    ratios = [
        min(timings[rival].median for rival in rivals if rival in timings) / timings[name].median
        for timings in (row["timings"] for row in rows)
        if timings.keys() & set(rivals)
    ]
    return f"{_geometric_mean(ratios):.2f}x ({min(ratios):.2f}x)" if ratios else "-"


def _of_peak(rows: list[dict], name: str, peak: float) -> str:
    shares = [2 * row["M"] * row["K"] * row["N"] / row["timings"][name].median / peak for row in rows]
    return f"{_geometric_mean(shares):.0%} ({min(shares):.0%})"


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def draw(results: list[dict], ceilings: peaks.Peaks, path: Path) -> None:
    """GOP/s over rows, which are half the operations per byte of an int8 weight; both logarithmic."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row["shape"], row["outliers"]) for row in results))
    columns = min(3, len(cases))
    height = math.ceil(len(cases) / columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(3 + 2.4 * columns, 1.2 + 2.5 * height), dpi=130, squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    panels = dict(zip(grid.flat, cases, strict=False))
    for axes in grid.flat:
        axes.set_visible(axes in panels)
    for axes in grid[-1]:
        axes.set_xlabel("rows M", fontsize=8)
    for axes, (shape, outliers) in panels.items():
        rows = [row for row in results if (row["shape"], row["outliers"]) == (shape, outliers)]
        _roofline(axes, sorted(rows, key=lambda row: row["M"]), ceilings)
        first = rows[0]
        axes.set_title(f"{shape}, {first['K']} to {first['N']}, {outliers} outliers", fontsize=7.5)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize=8)
    figure.supylabel("GOP/s", fontsize=9)
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path)


def _roofline(axes: Any, rows: list[dict], ceilings: peaks.Peaks) -> None:
    """One shape: the ceiling, and every contender below it."""
    sizes = [row["M"] for row in rows]
    if ceilings.int8_operations is not None:
        top = [min(ceilings.int8_operations, 2 * M * ceilings.bytes_read) / 1e9 for M in sizes]
        axes.plot(sizes, top, color="0.2", lw=1, label="int8 peak, or weights from memory")
    for index, name in enumerate(dict.fromkeys(name for row in rows for name in row["timings"])):
        points = [
            (row["M"], 2 * row["M"] * row["K"] * row["N"] / row["timings"][name].median / 1e9)
            for row in rows
            if name in row["timings"]
        ]
        width, dashes = (2, "-") if name.startswith("llmint8") else (1, "--")
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            ms=3,
            lw=width,
            ls=dashes,
            label=name,
            color=f"C{index}",
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(M) for M in sizes], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    typer.run(main)
