"""The folder that ``int8fx compile`` writes: which files it has, what each is, and what may run them.

    int8fx.json          what this module reads and writes: see ``Artefact``
    weights.safetensors  quantised weights as the kernels take them, and the float ones beside them
    prefill.so           the compiled graph for any number of tokens
    decode.so            the same for one token
    kernels.so           the CPU kernels of int8fx
    runner.so            what calls these libraries (``runner.cpp``)
    tokenizer.json       as the package tokenizers reads it

Neither torch nor transformers is imported.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8fx.ahead import machine
from int8fx.ahead.mapped import Memory
from int8fx.errors import ArtefactError
from int8fx.kernels.cpu.trusted import ForeignError, open_file, open_folder
from int8fx.version import __version__

MANIFEST = "int8fx.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
KERNELS, RUNNER = "kernels.so", "runner.so"
PREFILL, DECODE = "prefill", "decode"
FORMAT = 1

TOKENS = "tokens"  # the input of a program that changes from call to call


@dataclass(frozen=True)
class Buffer:
    """A tensor of the KV cache: zeros, before the first token.

    Attributes:
        dtype: as safetensors spells it.
        counts: whether it holds how many tokens the cache has.
    """

    dtype: str
    shape: tuple[int, ...]
    counts: bool

    @property
    def nbytes(self) -> int:
        return Memory(0, self.dtype, self.shape).nbytes


@dataclass(frozen=True)
class Graph:
    """A compiled graph.

    Attributes:
        inputs: their names, in order: ``TOKENS``, of weights or of buffers.
        calls: what it calls by torch's dispatcher, in the order of its own numbers: the operator's
            name, its overload, and for each argument its kind and its value. The graph gives a
            ``tensor``, ``tensors``, an ``int`` or ``ints`` at each call, and the value is how many;
            ``text``, ``real``, ``flag`` and ``none`` stay.
    """

    inputs: Sequence[str]
    calls: Sequence[tuple[str, str, Sequence[tuple[str, Any]]]]


@dataclass(frozen=True)
class Artefact:
    """What ``int8fx.json`` holds.

    Attributes:
        made_by: versions of int8fx and torch, the architecture and the instruction sets of its code.
        model, options: what was compiled, and how, for people.
        context: how many tokens the KV cache holds.
        vocabulary: how many logits there are.
        stop: tokens that end a text.
        chat: what its chat template needs: ``template``, and special tokens by their names.
        operators: ``(name, overload, schema)`` of int8fx's operators that the programs call.
        programs: the compiled graphs, by name.
        buffers: of the KV cache, by name.
        files: size in bytes of each file, and SHA-256 of those that are read whole.
        folder: where it is.
    """

    made_by: Mapping[str, Any]
    model: str
    options: Mapping[str, Any]
    context: int
    vocabulary: int
    stop: Sequence[int]
    chat: Mapping[str, str]
    operators: Sequence[Sequence[str]]
    programs: Mapping[str, Graph]
    buffers: Mapping[str, Buffer]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path = Path()

    def path(self, name: str) -> Path:
        return self.folder / name


def made_here(instructions: Sequence[str]) -> dict[str, Any]:
    """``made_by`` of an artefact that is made here."""
    return {
        "format": FORMAT,
        "int8fx": __version__,
        "torch": machine.torch_version(),
        "architecture": machine.architecture(),
        "instructions": list(instructions),
    }


def write(artefact: Artefact) -> None:
    """Writes the manifest, with the sizes and digests of the files that are in the folder."""
    files = {path.name: _described(path) for path in sorted(artefact.folder.iterdir())}
    values = dataclasses.asdict(artefact) | {"files": files}
    del values["folder"]
    artefact.path(MANIFEST).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")


def _described(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"bytes": path.stat().st_size}
    # Weights are mapped: to read them all would take longer than the first token.
    return described if path.name == WEIGHTS else described | {"sha256": _digest(path.read_bytes())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read(folder: str | Path) -> Artefact:
    """An artefact that may run here; nothing of it is loaded.

    Raises:
        ArtefactError: it is no artefact, or damaged, or made for another machine or torch: names the
            file, or what does not match.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ArtefactError(f"{folder}: no folder that int8fx compile wrote: {MANIFEST} is not there")
    artefact = _parsed(manifest)
    _check_made_by(folder, artefact.made_by)
    _check_files(artefact)
    return artefact


def _parsed(manifest: Path) -> Artefact:
    try:
        values = json.loads(manifest.read_text())
        given = values["made_by"]["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{manifest}: damaged: not what int8fx compile writes") from error
    if given != FORMAT:
        raise ArtefactError(f"{manifest}: format {given}, and this int8fx reads format {FORMAT}")
    try:
        buffers = {
            name: Buffer(each["dtype"], tuple(each["shape"]), each["counts"])
            for name, each in values.pop("buffers").items()
        }
        programs = {name: Graph(**each) for name, each in values.pop("programs").items()}
        return Artefact(**values, programs=programs, buffers=buffers, folder=manifest.parent)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{manifest}: damaged: {error}") from error


def _check_made_by(folder: Path, made_by: Mapping[str, Any]) -> None:
    here = made_here(())
    for name in ("architecture", "torch", "int8fx"):
        if made_by.get(name) != here[name]:
            raise ArtefactError(
                f"{folder}: made for {name} {made_by.get(name)}, and this is {name} {here[name]}; "
                "compile it again with int8fx compile"
            )
    if missing := machine.missing(made_by.get("instructions", ())):
        raise ArtefactError(
            f"{folder}: made for a CPU with {', '.join(missing)}, which this one lacks; compile it on "
            "this machine with int8fx compile"
        )


def _check_files(artefact: Artefact) -> None:
    """Every file is there and whole, and those whose code runs are this user's or root's alone."""
    needed = {WEIGHTS, TOKENIZER, KERNELS, RUNNER, *(f"{each}.so" for each in artefact.programs)}
    for name in sorted(needed | artefact.files.keys()):
        path = artefact.path(name)
        described = artefact.files.get(name)
        if described is None:
            raise ArtefactError(f"{artefact.path(MANIFEST)}: damaged: it does not list {name}")
        if not path.is_file():
            raise ArtefactError(f"{path}: is not there")
        if path.stat().st_size != described["bytes"]:
            raise ArtefactError(
                f"{path}: {path.stat().st_size} bytes, and {described['bytes']} were written (cut off?)"
            )


def open_trusted(artefact: Artefact, names: Sequence[str]) -> int:
    """A descriptor of the folder, once the files that run are as they were written, and by us.

    Raises:
        ArtefactError: somebody else can have written the folder or a file, or one was changed.
    """
    try:
        folder = open_folder(artefact.folder.resolve())
        try:
            for name in names:
                _check_content(artefact, name, open_file(name, folder, artefact.path(name)))
        except BaseException:
            os.close(folder)
            raise
    except (ForeignError, OSError) as error:
        raise ArtefactError(f"{error}: int8fx runs no code from there") from error
    return folder


def _check_content(artefact: Artefact, name: str, descriptor: int) -> None:
    with open(descriptor, "rb") as file:
        if _digest(file.read()) != artefact.files[name].get("sha256"):
            raise ArtefactError(f"{artefact.path(name)}: not as it was written (damaged?)")
