"""``int8fx compile``: a model into a folder that runs without a compiler and without transformers."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from int8fx import torch_private
from int8fx.ahead import artefact as files
from int8fx.ahead import machine, mapped
from int8fx.ahead.artefact import Artefact
from int8fx.ahead.trace import DTYPES, Tracer, described
from int8fx.arguments import check_module
from int8fx.errors import UserError
from int8fx.kernels.cpu import build
from int8fx.kernels.cpu.trusted import OTHERS_WRITE
from int8fx.kernels.devices import host_reads
from int8fx.options import Options

CONTEXT = 2048
RUNNER = Path(__file__).with_name("runner.cpp")
Step = Callable[[str], Any]


@dataclass(frozen=True)
class _Source:
    """What is compiled, and its name for people."""

    name: str
    model: Any
    tokenizer: Any


def compile_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    name: str = "",
    context: int | None = None,
    options: Mapping[str, Any] | None = None,
    step: Step = lambda text: None,
) -> Artefact:
    """Writes a folder for ``int8fx.load``.

    Args:
        model: a causal language model of transformers, on a CPU.
        tokenizer: of the package tokenizers, as transformers wraps it.
        folder: is made, whole or not at all; it is not there yet.
        name: of the model, for people; by default where it was loaded from.
        context: how many tokens the KV cache holds; by default what the model was made for, at most
            ``CONTEXT``.
        options: of the backend.
        step: is told what is done next.

    Raises:
        TypeError: the model is no module.
        UserError: this torch or the model does not fit, and why; or the folder cannot be made.
    """
    check_module(model, "compile_model")
    if not hasattr(model, "generation_config"):
        raise UserError(
            f"compile_model: {type(model).__name__} is no causal language model of transformers"
        )
    source = _Source(name or model.config.name_or_path or type(model).__name__, model, tokenizer)
    folder, options = Path(folder), dict(options or {})
    if folder.exists():
        raise UserError(f"{folder} is there already; give a folder that is not")
    device = next(model.parameters()).device
    if not host_reads(device):
        raise UserError(f"the model is on {device}: int8fx compile takes one on a CPU; model.to('cpu')")
    limit = getattr(_config(source), "max_position_embeddings", CONTEXT)
    context = min(CONTEXT, limit) if context is None else context
    if context < 4 or context > limit:
        raise UserError(f"--context {context}: allowed are 4 to {limit}, what the model was made for")
    torch_private.check_ahead()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder.parent) as unfinished:
            made = Path(unfinished) / folder.name
            made.mkdir()
            _write(source, made, options, context, step)
            made.replace(folder)
    except OSError as error:
        raise UserError(f"--out {folder}: {error}") from error
    return files.read(folder)


def _write(source: _Source, folder: Path, options: dict[str, Any], context: int, step: Step) -> None:
    chat = _write_tokenizer(source, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tracer = Tracer(source.model, context, Options.parse(options), Path(scratch))
        programs = {}
        for name, trace in ((files.DECODE, tracer.decode), (files.PREFILL, tracer.prefill)):
            step(f"Compiling the {name}")
            programs[name] = trace()
            _copy(programs[name].library, folder / f"{name}.so")
    step("Writing the weights")
    weights = {name: _content(each) for name, each in tracer.tensors.weights.items()}
    mapped.write_file(folder / files.WEIGHTS, weights)
    step("Compiling what runs them")
    _copy(build.build(), folder / files.KERNELS)
    _copy(build.build(source=RUNNER), folder / files.RUNNER)
    _protect(folder)
    files.write(
        Artefact(
            made_by=files.made_here(machine.instructions()),
            model=source.name,
            options={name: str(value) for name, value in options.items()},
            context=context,
            vocabulary=_config(source).vocab_size,
            stop=_stop(source),
            chat=chat,
            operators=sorted({each for program in programs.values() for each in program.operators}),
            programs={name: program.graph for name, program in programs.items()},
            buffers=described(tracer.tensors.buffers),
            folder=folder,
        )
    )


def _config(source: _Source) -> Any:
    return source.model.config.get_text_config(decoder=True)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _protect(folder: Path) -> None:
    """A umask may let others write, and what others may write is not run."""
    for path in (folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~OTHERS_WRITE)


def _content(tensor: Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    import torch

    content = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return DTYPES[tensor.dtype], tuple(tensor.shape), content


def _write_tokenizer(source: _Source, folder: Path) -> dict[str, str]:
    """The tokenizer's file; what its chat template needs."""
    backend = getattr(source.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"model {source.name}: its tokenizer, {type(source.tokenizer).__name__}, is none of the "
            "package tokenizers, and one of these is needed"
        )
    backend.save(str(folder / files.TOKENIZER))
    words = {
        name: str(value)
        for name, value in source.tokenizer.special_tokens_map.items()
        if isinstance(value, str)
    }
    template = source.tokenizer.chat_template
    return words | ({"template": template} if isinstance(template, str) else {})


def _stop(source: _Source) -> list[int]:
    """The tokens that end a text, as ``generate`` takes them."""
    given = source.model.generation_config.eos_token_id
    given = source.tokenizer.eos_token_id if given is None else given
    listed = given if isinstance(given, list | tuple) else [given]
    return sorted({int(each) for each in listed if each is not None})
