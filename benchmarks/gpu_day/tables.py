"""Tiles: which are tried, how one is forced, and the table of those that were fastest."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gpu_day.lines import Line, of_step


def label(tile: Any) -> str:
    """A tile as JSON, without what is at its default."""
    fields = dataclasses.fields(tile)
    return json.dumps({f.name: v for f in fields if (v := getattr(tile, f.name)) != f.default})


def product_candidates(
    device: str, M: int, N: int, K: int, more: Callable[[str], Iterable[Any]]
) -> list[Any]:
    """The table's for a shape, the built-in guess last; before it those of ``more`` that are not in it,
    whole and with K in as many parts as suit them."""
    import torch

    from int8fx.kernels.gpu import configs

    where = torch.device(device)
    arch, processors = configs.architecture(where), configs.multiprocessors(where)
    own = configs.gemm_configs(arch, M, N, K, torch.float16, processors)
    rows = configs.row_class(M)
    other = []
    for tile in more(arch):
        tiles = -(-M // tile.block_m) * -(-N // tile.block_n)
        parts = 1 if rows is None else configs.gemm_parts(tile, tiles, K, processors)
        other += [dataclasses.replace(tile, parts=each) for each in {1, parts}]
    return [*(tile for tile in other if tile not in own), *own]


def decode_candidates(device: str, kind: str, N: int, K: int) -> list[Any]:
    """All of a kind, the built-in guess last."""
    import torch

    from int8fx.kernels.gpu import configs

    where = torch.device(device)
    arch, processors = configs.architecture(where), configs.multiprocessors(where)
    *_, guess = configs.decode_configs(arch, kind, N, K, processors)
    return [*(tile for tile in configs.DECODE[arch][kind] if tile != guess), guess]


def of_product(device: str, tile: Any, M: int, N: int, K: int) -> Any:
    """A table that knows one tile for one shape."""
    from int8fx.kernels.gpu import configs

    return _table(device, products={(configs.row_class(M), N, K): tile})


def of_decode(device: str, tile: Any, kind: str, N: int, K: int) -> Any:
    return _table(device, decodes={(kind, N, K): tile})


def _table(device: str, **tiles: Any) -> Any:
    import torch

    from int8fx.kernels.gpu import configs
    from int8fx.kernels.gpu.tile_tables import TileTable

    where = torch.device(device)
    arch, processors = configs.architecture(where), configs.multiprocessors(where)
    return TileTable("one tile", arch, processors, "", {}, **tiles)


def forced(call: Callable[[], Any], table: Any) -> Callable[[], Any]:
    """The call, with tiles from a table."""
    from int8fx.kernels.gpu.tile_tables import using

    def run() -> Any:
        with using(table):
            return call()

    return run


def fastest(us: dict[str, float]) -> tuple[str, float] | None:
    """The fastest tile of a line, and its microseconds."""
    tiles = {tile: time for tile, time in us.items() if tile.startswith("{")}
    return min(tiles.items(), key=lambda pair: pair[1]) if tiles else None


def kind_of_decode(M: int, way: str) -> str:
    """What a decode of M rows is, as a key of ``configs.DECODE``."""
    from int8fx.kernels.gpu.decode import tile_rows
    from int8fx.kernels.gpu.residues import RESIDUES

    return "quantises" if M > 1 and way == "column" else f"rows {tile_rows(M, RESIDUES)}"


def measured(lines: list[Line]) -> Any:
    """The table of the GPU that the lines are of.

    Raises:
        ValueError: they do not say of which.
    """
    from int8fx.kernels.gpu.configs import DecodeConfig, GemmConfig, row_class
    from int8fx.kernels.gpu.tile_tables import TileTable

    machine = next(of_step(lines, "machine"), None)
    if machine is None or "device" not in machine:
        raise ValueError("no line says of which GPU they are: the step 'machine' has not run")
    products: dict[Any, Any] = {}
    decodes: dict[Any, Any] = {}
    us: dict[Any, float] = {}
    for line, tile, time in _fastest_of(lines, "tiles"):
        key = row_class(line["M"]), line["N"], line["K"]
        products[key], us[key] = GemmConfig(**tile), time
    # A kind serves several M: the table has what is fastest for the most rows that were measured.
    for line, tile, time in sorted(_fastest_of(lines, "decodes"), key=lambda each: each[0]["M"]):
        key = line["kind"], line["N"], line["K"]
        decodes[key], us[key] = DecodeConfig(**tile), time
    return TileTable(
        machine["device"], machine["arch"], machine["processors"], machine["driver"],
        machine["versions"], products, decodes, us,
    )  # fmt: skip


def _fastest_of(lines: list[Line], step: str) -> Iterator[tuple[Line, dict[str, int], float]]:
    for line in of_step(lines, step):
        best = fastest(line["us"])
        if best is not None:
            yield line, json.loads(best[0]), best[1]
