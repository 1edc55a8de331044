"""Tiles measured on one GPU: ``tables/<gpu>.json``, whose word goes before the built-in guess.

A table has a row for each measured shape, and says nothing about others. It is for 16-bit activations,
and for the release of Triton that it was measured with: another compiler may need more shared memory.
Where there is none, ``configs.py`` decides alone. ``benchmarks/gpu.py`` measures and writes one.

The file, format 1::

    {"format": 1,
     "device": {"name": "NVIDIA H200", "arch": "sm_90", "processors": 132, "driver": "580.65"},
     "versions": {"torch": "2.11.0", "triton": "3.6.0"},
     "products": [{"rows": 512, "N": 6144, "K": 4096, "tile": {"block_m": 128, ...}, "us": 31.5}],
     "decodes": [{"kind": "rows 16", "N": 6144, "K": 4096, "tile": {"block_n": 32, ...}, "us": 9.1}]}

``rows`` is a class of M (``configs.row_class``), null above the last; ``N`` the output channels of the
linears that share an activation; ``kind`` a key of ``configs.DECODE``; a tile the fields of a
``GemmConfig`` or a ``DecodeConfig`` that are not at their default; ``us`` what it took.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.configs import DecodeConfig, GemmConfig

FORMAT = 1
FOLDER = Path(__file__).with_name("tables")
_VENDORS = ("nvidia", "amd", "geforce")
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_MOST_LINEARS = 3  # whose tiles do not share a column: each may have one that is not full

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TileTable:
    """What one file holds.

    Attributes:
        products: tiles of ``gemm.py`` by class of rows, N and K.
        decodes: tiles of ``decode.py`` by kind, N and K.
        us: what each of them took, under the same keys.
    """

    device: str
    arch: str
    processors: int
    driver: str
    versions: dict[str, str]
    products: dict[tuple[int | None, int, int], GemmConfig] = field(default_factory=dict)
    decodes: dict[tuple[str, int, int], DecodeConfig] = field(default_factory=dict)
    us: dict[tuple[Any, int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (rows, N, K), tile in self.products.items():
            _check_tile(tile, rows, N, K)
        kinds = configs.DECODE.get(self.arch, {})
        for kind, N, K in self.decodes:
            if kind not in kinds:
                known = ", ".join(map(repr, kinds)) or f"none for {self.arch!r}"
                raise ValueError(f"decode of kind {kind!r} (N = {N}, K = {K}); known: {known}")

    def to_json(self) -> str:
        def entries(key: str, tiles: dict[Any, Any]) -> list[dict[str, Any]]:
            return [
                {key: kind, "N": N, "K": K, "tile": _changed(tile), "us": self.us.get((kind, N, K))}
                for (kind, N, K), tile in tiles.items()
            ]

        device = {"name": self.device, "arch": self.arch, "processors": self.processors}
        head: dict[str, Any] = {"format": FORMAT, "device": device | {"driver": self.driver}}
        head["versions"] = self.versions
        lines = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
        for name, key, tiles in (
            ("products", "rows", self.products),
            ("decodes", "kind", self.decodes),
        ):
            rows = ",\n  ".join(map(json.dumps, entries(key, tiles)))
            lines.append(f'"{name}": [\n  {rows}]')
        return "{" + ",\n ".join(lines) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> "TileTable":
        """Raises:
        ValueError: the text is no JSON, of another format, lacks something or names an unknown field.
        """
        given = json.loads(text)
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            found = given.get("format") if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"a table of tiles of format {found!r}; known: {FORMAT}")
        try:
            device = given["device"]
            products = {_key(row, "rows"): _tile(GemmConfig, row) for row in given["products"]}
            decodes = {_key(row, "kind"): _tile(DecodeConfig, row) for row in given["decodes"]}
            us = {_key(row, "rows"): row["us"] for row in given["products"]}
            us |= {_key(row, "kind"): row["us"] for row in given["decodes"]}
            return cls(
                device["name"], device["arch"], device["processors"], device["driver"],
                given["versions"], products, decodes, us,
            )  # fmt: skip
        except KeyError as missing:
            raise ValueError(f"a table of tiles without {missing}") from None


def _key(row: dict[str, Any], first: str) -> tuple[Any, int, int]:
    return row[first], row["N"], row["K"]


def _tile(kind: type, row: dict[str, Any]) -> Any:
    known = {each.name: each for each in dataclasses.fields(kind)}
    given = row["tile"]
    if unknown := set(given) - set(known):
        raise ValueError(f"a tile with {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if wrong := [name for name, value in given.items() if type(value) is not int or value < 0]:
        raise ValueError(f"a tile whose {wrong[0]} is {given[wrong[0]]!r}; it has to be an integer")
    required = [name for name, each in known.items() if each.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"a tile without {', '.join(missing)}")
    return kind(**given)


def _changed(tile: Any) -> dict[str, Any]:
    fields = dataclasses.fields(tile)
    return {f.name: value for f in fields if (value := getattr(tile, f.name)) != f.default}


def _check_tile(tile: GemmConfig, rows: int | None, N: int, K: int) -> None:
    """Tiles whose K is split count themselves, and there are so many counters. An extended tile has
    half as many rows again, which ``configs.extended_tiles`` relies on."""
    if tile.extra_m not in (0, tile.block_m // 2):
        raise ValueError(f"extra_m {tile.extra_m} of block_m {tile.block_m}; 0 or half of it")
    if (tile.parts or 1) == 1:
        return
    where = f"{tile.parts} parts for rows = {rows}, N = {N}, K = {K}"
    if rows is None or tile.extra_m:
        raise ValueError(f"{where}: K is split in a class of rows that ends, without extended tiles")
    tiles = -(-rows // tile.block_m) * (-(-N // tile.block_n) + _MOST_LINEARS - 1)
    if tiles > configs.COUNTERS:
        raise ValueError(f"{where}: {tiles} tiles; {configs.COUNTERS} can be counted")


def file_name(device: str) -> str:
    """Of a GPU's table: ``h200.json`` for ``"NVIDIA H200"``."""
    words = [word for word in device.lower().replace("/", " ").split() if word not in _VENDORS]
    return "-".join(words) + ".json"


def load(device: str, arch: str, folder: Path = FOLDER) -> TileTable | None:
    """The table of a GPU, if there is one for this release of Triton.

    Args:
        device: its name, as torch has it.
        arch: ``configs.architecture``'s.

    Raises:
        ValueError: the file is none (``TileTable.from_json``), or of another GPU.
    """
    path = folder / file_name(device)
    if not path.is_file():
        logger.debug("no tiles were measured on %s: the built-in table decides", device)
        return None
    try:
        table = TileTable.from_json(path.read_text())
        if (table.device, table.arch) != (device, arch):
            raise ValueError(f"it is of {table.device} ({table.arch}), not of {device} ({arch})")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    measured = table.versions.get("triton", "")
    if _series(measured) != _series(triton.__version__):
        logger.info(
            "tiles of %s were measured with triton %s, and this is %s: the built-in table decides",
            device,
            measured,
            triton.__version__,
        )
        return None
    return table


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


_loaded = functools.cache(load)
_GIVEN: contextvars.ContextVar[TileTable | None] = contextvars.ContextVar("tile_table", default=None)


@contextlib.contextmanager
def using(table: TileTable) -> Iterator[None]:
    """Within it, kernels take their tiles from ``table``, on whatever device."""
    token = _GIVEN.set(table)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def of(device: torch.device) -> TileTable | None:
    """What the kernels on a device go by, or None: the built-in table alone."""
    given = _GIVEN.get()
    if given is not None:
        return given
    return _loaded(torch.cuda.get_device_properties(device).name, configs.architecture(device))


def product_tiles(
    candidates: Sequence[GemmConfig], device: torch.device, M: int, N: int, K: int, dtype: torch.dtype
) -> list[GemmConfig]:
    """Candidates for a product, the best guess last: what was measured, where something was."""
    table = of(device) if dtype in _SIXTEEN_BIT else None
    best = None if table is None else table.products.get((configs.row_class(M), int(N), int(K)))
    if best is not None and best.extra_m:
        # A launch is told one number of extended tiles, whichever candidate it takes (``linear.py``).
        candidates = [candidate for candidate in candidates if not candidate.extra_m]
    return _with_best(candidates, best)


def decode_tiles(
    candidates: Sequence[DecodeConfig],
    device: torch.device,
    kind: str,
    N: int,
    K: int,
    dtype: torch.dtype,
) -> list[DecodeConfig]:
    """The same for a kind of decode."""
    table = of(device) if dtype in _SIXTEEN_BIT else None
    best = None if table is None else table.decodes.get((kind, int(N), int(K)))
    return _with_best(candidates, best)


def _with_best(candidates: Sequence[Any], best: Any) -> list[Any]:
    if best is None:
        return list(candidates)
    return [*(candidate for candidate in candidates if candidate != best), best]
