"""What a checkpoint holds, by its headers and one module of each kind: ``int8fx inspect``."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from int8fx.errors import CheckpointError
from int8fx.module_path import ModulePath
from int8fx.weights.readers import storing, table
from int8fx.weights.readers.container import Container, dtype_of
from int8fx.weights.readers.loading import Checkpoint
from int8fx.weights.readers.neutral import Coded, Grouped, Neutral
from int8fx.weights.readers.opening import opened

FLOAT = "float"
_SCHEME, _SCALE = ".weight_scheme", ".weight_scale"


@dataclass(frozen=True)
class Kind:
    """Modules that are kept alike, but for their shapes.

    Attributes:
        bits: of a weight.
        group: how many columns share a scale; None: all.
        details: zero points, act-order and the like.
        scheme: the scheme of int8fx that keeps them.
        modules: how many there are.
        example: the path of the first.
        bytes: of their tensors in the files.
    """

    bits: int
    group: int | None
    details: str
    scheme: str
    modules: int
    example: str
    bytes: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds; ``print`` it with rich, or take ``to_dict``.

    Attributes:
        format: its name, ``int8fx``, or ``float``.
        settings: of the configuration in the files, without those that tell how they were made.
        kinds: of quantised modules.
        floats: how many tensors are in float, and their bytes.
        files: how many there are, and their bytes.
    """

    path: str
    format: str
    settings: Mapping[str, Any]
    kinds: list[Kind] = field(default_factory=list)
    floats: tuple[int, int] = (0, 0)
    files: tuple[int, int] = (0, 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        count, size = self.files
        said = "".join(f", {name} {value}" for name, value in self.settings.items())
        files = "1 file" if count == 1 else f"{count} files"
        title = Text(f"{self.path}: {self.format}{said}; {files}, {_mib(size)} MiB")
        # Without lines, so that 80 columns are enough for a module's path.
        shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in ("modules", "bits", "group", "", "kept as", "MiB"):
            justify: JustifyMethod = "right" if name in ("modules", "bits", "MiB") else "left"
            shown.add_column(name, justify=justify, no_wrap=True)
        shown.add_column("example", overflow="fold")
        for kind in self.kinds:
            group = "all" if kind.group is None else str(kind.group)
            numbers = str(kind.modules), str(kind.bits), group, kind.details, kind.scheme
            shown.add_row(*numbers, _mib(kind.bytes), ModulePath(kind.example))
        tensors, size = self.floats
        shown.add_row(str(tensors), "", "", "tensors in float", "", _mib(size), "")
        return Group(title, shown)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


# What is shown of a file's configuration.
_SHOWN = (
    "bits", "w_bit", "group_size", "q_group_size", "desc_act", "sym", "version", "checkpoint_format",
    "format", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "weight_block_size",
)  # fmt: skip


def inspect(path: Path) -> Contents:
    """Raises:
    CheckpointError: a file is damaged, or of a format that is not read.
    FileNotFoundError: there is no checkpoint.
    """
    container = opened(path)
    files = {entry.file for entry in container.entries.values()}
    sizes = (len(files), sum(file.stat().st_size for file in files))
    reader = table.reader_of(container)
    if reader is None:
        return _ours_or_float(container, sizes)
    checkpoint = Checkpoint.of(container, reader)
    config = table.config_of(container).values
    settings = {name: config[name] for name in _SHOWN if name in config}
    if reader.name == "GGUF":
        settings = {"architecture": container.metadata.get("general.architecture", "unknown")}
    floats = [container.entries[name].nbytes for name in checkpoint.plain]
    return Contents(
        str(container.path),
        reader.name,
        settings,
        _kinds(checkpoint),
        (len(floats), sum(floats)),
        sizes,
    )


def _kinds(checkpoint: Checkpoint) -> list[Kind]:
    """One module of each set with tensors of the same dtypes and shapes is read."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for path, entries in checkpoint.modules.items():
        stored = (checkpoint.container.entries[name] for name in entries.values())
        alike[
            tuple((entry, s.dtype, s.shape) for entry, s in zip(entries, stored, strict=True))
        ].append(path)
    merged: dict[tuple[int, int | None, str, str], list[str]] = defaultdict(list)
    for paths in alike.values():
        merged[_described(checkpoint, paths[0])].extend(paths)
    return [
        Kind(*said, modules=len(paths), example=paths[0], bytes=_bytes(checkpoint, paths))
        for said, paths in merged.items()
    ]


def _bytes(checkpoint: Checkpoint, paths: list[str]) -> int:
    names = (name for path in paths for name in checkpoint.modules[path].values())
    return sum(checkpoint.container.entries[name].nbytes for name in names)


def _described(checkpoint: Checkpoint, path: str) -> tuple[int, int | None, str, str]:
    guessed = _shape_of(checkpoint, path)
    neutral = checkpoint.read(path, guessed)
    checkpoint.release(path)
    group = neutral.group if isinstance(neutral, Grouped | Coded) else None
    if guessed is None and group is not None and group >= neutral.shape[1]:
        group = None
    try:
        scheme = storing.scheme_of(neutral, path)
    except CheckpointError as error:
        scheme = str(error).partition(": ")[2]
    return neutral.bits, group, _details(neutral), scheme


def _shape_of(checkpoint: Checkpoint, path: str) -> tuple[int, int] | None:
    """Of quanto's groups, which alone do not say how many there are in a row: as if there were one."""
    if checkpoint.reader.name != "quanto":
        return None
    scales = checkpoint.container.entries[checkpoint.modules[path]["weight._scale"]].shape[0]
    packed = checkpoint.modules[path].get("weight._data._data")
    if packed is None:
        return None
    return scales, checkpoint.container.entries[packed].shape[1]


def _details(neutral: Neutral) -> str:
    if isinstance(neutral, Coded):
        return "codebook"
    if not isinstance(neutral, Grouped):
        return type(neutral).__name__.lower()
    said = []
    if neutral.offset is not None:
        said.append("offsets")
    elif neutral.zero_point is not None:
        middle = bool((neutral.zero_point == 2 ** (neutral.bits - 1)).all())
        floating = neutral.zero_point.is_floating_point()
        said.append("symmetric" if middle else "zero points in float" if floating else "zero points")
    else:
        said.append("symmetric")
    if neutral.transposed:
        said.append("groups of rows")
    elif neutral.g_idx is not None:
        said.append("act-order")
    return ", ".join(said)


def _ours_or_float(container: Container, sizes: tuple[int, int]) -> Contents:
    """Files of int8fx say what they are in an entry beside each weight, or are int8 by channel."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in container.entries:
        path = name.removesuffix(_SCALE)
        if name.endswith(_SCALE):
            alike[_scheme_in(container, path + _SCHEME)].append(path)
    kinds = []
    taken: set[str] = set()
    for scheme, paths in alike.items():
        names = {n for n in container.entries if n.startswith(tuple(f"{p}.weight" for p in paths))}
        taken |= names
        size = sum(container.entries[name].nbytes for name in names)
        kinds.append(_of_ours(scheme, paths, size))
    floats = [entry.nbytes for name, entry in container.entries.items() if name not in taken]
    config = {k: v for k, v in table.config_of(container).values.items() if k != "quant_method"}
    name = table.OURS if kinds else FLOAT
    settings = config if kinds else {"dtype": _dtypes(container)}
    return Contents(str(container.path), name, settings, kinds, (len(floats), sum(floats)), sizes)


def _dtypes(container: Container) -> str:
    found = {str(dtype_of(entry)).removeprefix("torch.") for entry in container.entries.values()}
    return ", ".join(sorted(found))


def _scheme_in(container: Container, name: str) -> str:
    if name not in container.entries:
        return "int8 per channel"
    try:
        said = json.loads(bytes(container.tensor(name).tolist()))
        return json.dumps({"scheme": said["scheme"], **said["settings"]})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{container.entries[name].file}: {name}: damaged: {error}") from error


def _of_ours(scheme: str, paths: list[str], size: int) -> Kind:
    if not scheme.startswith("{"):
        return Kind(8, None, "symmetric", scheme, len(paths), paths[0], size)
    said = json.loads(scheme)
    group = said.get("group_size", -1)
    bits = said.get("bits", 4 if said["scheme"].startswith(("w4", "nf4")) else 8)
    details = str(said.get("zeros", "")).replace("middle", "symmetric")
    return Kind(bits, None if group < 0 else group, details, said["scheme"], len(paths), paths[0], size)
