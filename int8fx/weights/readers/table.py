"""All readers, by name. A new one is a file beside this one, and a row here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from int8fx.errors import CheckpointError
from int8fx.weights.readers import (
    awq,
    bitsandbytes,
    comfyui,
    compressed_tensors,
    eetq,
    fp8,
    gguf,
    gptq,
    hqq,
    mxfp4,
    quanto,
    torchao,
)
from int8fx.weights.readers.container import Container
from int8fx.weights.readers.module import StoredModule
from int8fx.weights.readers.neutral import Neutral
from int8fx.weights.readers.settings import Config

OURS = "int8fx"


@dataclass(frozen=True)
class Reader:
    """One format.

    Attributes:
        name: as messages call it.
        method: what ``quant_method`` of a ``config.json`` says; empty: files say it otherwise.
        marks: the ends of names that a module of this format has one of.
        entries: the ends of all names that belong to such a module, its bias not among them.
        settings: of the configuration in the file.
        read: what the file holds of a module, and those settings, to the weight.
    """

    name: str
    method: str
    marks: tuple[str, ...]
    entries: tuple[str, ...]
    settings: Callable[[Config], Any]
    read: Callable[[StoredModule, Any], Neutral]


_NESTED = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_CT_MARKS = ("weight_packed", "weight_scale")
_CT_OTHERS = ("weight", "weight_zero_point", "weight_g_idx", "weight_shape")
_QUANTO = ("weight._data", "weight._data._data")

READERS: tuple[Reader, ...] = (
    Reader(
        "GPTQ", "gptq", ("qweight",), ("qweight", "qzeros", "scales", "g_idx"), gptq.settings, gptq.read
    ),
    Reader(
        "AWQ",
        "awq",
        ("qweight",),
        ("qweight", "qzeros", "scales", "scaled_zeros"),
        awq.settings,
        awq.read,
    ),
    Reader(
        "bitsandbytes",
        "bitsandbytes",
        (*bitsandbytes.STATES, "SCB"),
        ("weight", *_NESTED, *bitsandbytes.STATES, "SCB", "weight_format"),
        bitsandbytes.settings,
        bitsandbytes.read,
    ),
    Reader("EETQ", "eetq", ("weight_scales",), ("weight", "weight_scales"), eetq.settings, eetq.read),
    Reader("HQQ", "hqq", ("W_q",), ("W_q", "scale", "zero", *hqq.NUMBERS), hqq.settings, hqq.read),
    Reader(
        "quanto",
        "quanto",
        _QUANTO,
        (*_QUANTO, "weight._scale", "weight._shift", "input_scale", "output_scale"),
        quanto.settings,
        quanto.read,
    ),
    Reader(
        "compressed-tensors",
        "compressed-tensors",
        _CT_MARKS,
        (*_CT_MARKS, *_CT_OTHERS),
        compressed_tensors.settings,
        compressed_tensors.read,
    ),
    Reader(
        "torchao",
        "torchao",
        (torchao.DATA,),
        (torchao.DATA, torchao.SCALE, torchao.ZERO_POINT, *torchao.UNREAD),
        torchao.settings,
        torchao.read,
    ),
    Reader("GGUF", "gguf", (), ("weight",), gguf.settings, gguf.read),
    Reader(
        "ComfyUI",
        "",
        (comfyui.MARKER,),
        ("weight", "weight_scale", comfyui.MARKER),
        comfyui.settings,
        comfyui.read,
    ),
    Reader(
        "FP8",
        "fp8",
        ("weight_scale_inv",),
        ("weight", "weight_scale_inv", "activation_scale"),
        fp8.settings,
        fp8.read,
    ),
    Reader(
        "MXFP4",
        "mxfp4",
        ("weight_blocks",),
        ("weight_blocks", "weight_scales"),
        mxfp4.settings,
        mxfp4.read,
    ),
)


def named(name: str) -> Reader:
    return next(reader for reader in READERS if reader.name == name)


def config_of(container: Container) -> Config:
    """The part of the configuration that is about quantisation; empty where there is none."""
    for part in (container.config, container.config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict):
            return Config(found, f"{container.path}: quantization_config")
    return Config({}, f"{container.path}: quantization_config")


def reader_of(container: Container) -> Reader | None:
    """The format of a checkpoint; None: it is of int8fx, or in float.

    Raises:
        CheckpointError: it is of a format that is not read, or its settings are missing.
    """
    config = config_of(container)
    method = config.get("quant_method")
    if method == OURS:
        return None
    if method is not None:
        found = next((reader for reader in READERS if reader.method == method), None)
        if found is None:
            read = ", ".join(reader.method for reader in READERS if reader.method)
            raise config.error(f"quant_method = {method!r}; read: {read}, {OURS}")
        return found
    return _by_names(container)


# Formats whose files say themselves what they are.
_SELF_DESCRIBED = ("quanto", "HQQ", "ComfyUI", "bitsandbytes", "torchao")


def _by_names(container: Container) -> Reader | None:
    for name in _SELF_DESCRIBED:
        if modules_of(container.entries, named(name)):
            return named(name)
    silent = modules_of(container.entries, named("GPTQ"))
    if silent:
        raise CheckpointError(
            f"{container.path}: {next(iter(silent))}.qweight is of GPTQ or AWQ, and no config.json or "
            "quantize_config.json says of which bits, group and version"
        )
    return None


def modules_of(names: Iterable[str], reader: Reader) -> list[str]:
    """The paths of the modules whose weights are of a format."""
    paths = {}
    for name in names:
        for mark in reader.marks:
            if name == mark or name.endswith(f".{mark}"):
                paths[name[: -len(mark)].removesuffix(".")] = True
    return list(paths)
