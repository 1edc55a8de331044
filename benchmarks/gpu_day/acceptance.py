"""What a GPU has to show before anything is claimed of its speed: for an H200, and its like."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_day.lines import Line, of_step

M = 4096
OURS = "column fp16"
CUBLAS = ("fp16", "fp16 joined", "bf16", "bf16 joined")


@dataclass(frozen=True)
class Criterion:
    """One row.

    Attributes:
        least, aimed: what has to be reached, and what should be.
        measured: the figure in a day's lines, or None: they do not have it.
    """

    what: str
    unit: str
    least: float
    aimed: float
    measured: Callable[[list[Line]], float | None]

    def verdict(self, lines: list[Line]) -> str:
        found = self.measured(lines)
        if found is None:
            return "not measured"
        reached = "aim reached" if found >= self.aimed else "met" if found >= self.least else "missed"
        return f"{self.number(found)}, {reached}"

    def number(self, value: float) -> str:
        return f"{value:,.0f} {self.unit}" if self.unit != "x" else f"{value:.2f}x"


def _us(lines: Iterable[Line], step: str, layer: str, rows: int) -> dict[str, float]:
    """Of all contenders at one layer and number of rows."""
    found: dict[str, float] = {}
    for line in of_step(lines, step):
        if (line.get("layer"), line.get("M")) == (layer, rows):
            found |= line["us"]
    return found


def _best_cublas(us: dict[str, float]) -> float | None:
    return min((us[who] for who in CUBLAS if us.get(who)), default=None)


def product_tops(lines: list[Line]) -> float | None:
    """Of gate/up, with the fastest tile."""
    us = _us(lines, "tiles", "gate/up", M)
    line = next((line for line in of_step(lines, "tiles") if line["M"] == M), None)
    times = [time for time in us.values() if time]
    return 2 * M * line["N"] * line["K"] / min(times) / 1e6 if line and times else None


def over_cublas(layer: str) -> Callable[[list[Line]], float | None]:
    """How many times as fast as the faster of fp16 and bf16, each by itself or joined."""

    def ratio(lines: list[Line]) -> float | None:
        us = _us(lines, "linears", layer, M)
        best = _best_cublas(us)
        return best / us[OURS] if best and us.get(OURS) else None

    return ratio


def decode_over_cublas(lines: list[Line]) -> float | None:
    """Of all linears of a layer together, one row each."""
    layers = [line["layer"] for line in of_step(lines, "decodes") if "kind" not in line]
    pairs = [
        (_best_cublas(us := _us(lines, "decodes", layer, 1)), us.get(OURS))
        for layer in dict.fromkeys(layers)
    ]
    whole = [(best, ours) for best, ours in pairs if best and ours]
    if not whole or len(whole) < len(pairs):
        return None
    return sum(best for best, _ in whole) / sum(ours for _, ours in whole)


def decoder(phase: str) -> Callable[[list[Line]], float | None]:
    """How many times as fast as bf16 under Inductor with CUDA graphs."""

    def ratio(lines: list[Line]) -> float | None:
        us = {line["who"]: line["us"].get(phase) for line in of_step(lines, "decoder") if "us" in line}
        return us["bf16"] / us["column"] if us.get("bf16") and us.get("column") else None

    return ratio


CRITERIA = (
    Criterion("product of gate/up, M = 4096", "TOPS", 900, 1150, product_tops),
    Criterion(
        "norm and gate/up over the best cuBLAS, M = 4096", "x", 1.2, 1.45, over_cublas("gate/up")
    ),
    Criterion("norm and q/k/v over the best cuBLAS, M = 4096", "x", 1.1, 1.3, over_cublas("q/k/v")),
    Criterion("norm and down over the best cuBLAS, M = 4096", "x", 1.1, 1.3, over_cublas("down")),
    Criterion("norm and o over the best cuBLAS, M = 4096", "x", 1.0, 1.2, over_cublas("o")),
    Criterion(
        "norms and linears of a layer over the best cuBLAS, M = 1", "x", 1.5, 1.7, decode_over_cublas
    ),
    Criterion("a decoder's prefill over Inductor in bf16", "x", 1.1, 1.3, decoder("prefill")),
    Criterion(
        "a decoder's decode, batch 1, over Inductor in bf16", "x", 1.35, 1.55, decoder("decode 1")
    ),
)
HEADING = """\
## What an H200 has to show

Nothing is claimed of the speed on a GPU before one has shown the second column. The third is aimed at.
`python benchmarks/gpu.py` measures them. Linears are Llama-3-8B's, in fp16, in the column
decomposition.
"""


def page(lines: list[Line] | None = None) -> str:
    """The table; with what was measured, where there are lines."""
    rows = [["", "at least", "aimed at"], ["---"] * 3]
    rows += [[c.what, c.number(c.least), c.number(c.aimed)] for c in CRITERIA]
    if lines is not None:
        more = ["measured", "---", *(c.verdict(lines) for c in CRITERIA)]
        rows = [[*row, cell] for row, cell in zip(rows, more, strict=True)]
    return HEADING + "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
