"""The model against the measurement: does it rank tiles as the GPU does?

A tile's modelled time is that of the product alone, a measured one has the same launches around it for
each tile. So what is compared is the order, and what going by the model would have cost.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_day.lines import Line, of_step
from gpu_day.shapes import OUTLIERS

# Microseconds that the model gives a tile of a line, or None: it has no word for it.
Model = Callable[[Line, dict[str, int]], float | None]


@dataclass(frozen=True)
class Compared:
    """One shape.

    Attributes:
        agreement: Spearman's rank correlation; None with fewer than three tiles.
        lost: how much longer than the fastest the tile takes that the model would have chosen.
    """

    what: str
    tiles: int
    agreement: float | None
    lost: float


def compared(lines: list[Line], model: Model) -> Iterator[Compared]:
    """All shapes of which two tiles or more were measured and modelled."""
    for step in ("tiles", "decodes"):
        for line in of_step(lines, step):
            tiles = {name: us for name, us in line["us"].items() if name.startswith("{") and us}
            given = {name: model(line, json.loads(name)) for name in tiles}
            pairs = [(us, each) for name, us in tiles.items() if (each := given[name]) is not None]
            if len(pairs) >= 2:
                kind = f", {line['kind']}" if "kind" in line else ""
                measured, modelled = zip(*pairs, strict=True)
                chosen = min(pairs, key=lambda pair: pair[1])[0]
                lost = chosen / min(measured) - 1
                what = f"{line['layer']}, M = {line['M']}{kind}"
                yield Compared(what, len(pairs), spearman(measured, modelled), lost)


def spearman(left: tuple[float, ...], right: tuple[float, ...]) -> float | None:
    """The correlation of ranks, without ties: of two pairs there is none to speak of."""
    count = len(left)
    if count < 3:
        return None

    def ranks(values: tuple[float, ...]) -> list[int]:
        order = sorted(values)
        return [order.index(value) for value in values]

    apart = sum((a - b) ** 2 for a, b in zip(ranks(left), ranks(right), strict=True))
    return 1 - 6 * apart / (count * (count**2 - 1))


def cost_model(gpu: Any) -> Model:
    """``gpu_model.py`` for one data sheet."""
    import gpu_model

    from int8fx.kernels.gpu import configs, decode, residues
    from int8fx.testing.gpuless import specimens

    def microseconds(line: Line, tile: dict[str, int]) -> float | None:
        M, N, K = line["M"], line["N"], line["K"]
        if "kind" not in line:
            config = configs.GemmConfig(**tile)
            seen = specimens.gemm(gpu.arch, config).inspection
            return 1e6 * gpu_model.product(gpu, config, seen, M, N, K, OUTLIERS).seconds
        kind, row = line["kind"], configs.DecodeConfig(**tile)
        quantizes = kind == "quantises"
        rows = 16 if quantizes else decode.tile_rows(M, residues.RESIDUES)
        parts = configs.split_k(kind, row, N, K, gpu.processors)
        seen = specimens.decode(gpu.arch, kind, row, columns=K // parts).inspection
        outliers = OUTLIERS if quantizes else 0
        return 1e6 * gpu_model.decode(gpu, row, seen, M, N, K, parts, rows, outliers).seconds

    return microseconds


def sheet(device: str, arch: str) -> Any:
    """The data sheet of a GPU, or of the first of its architecture; None, there is none."""
    import gpu_model

    named = [gpu for gpu in gpu_model.SHEETS if gpu.name.split()[0] in device.split()]
    return next(iter(named + [gpu for gpu in gpu_model.SHEETS if gpu.arch == arch]), None)
