"""``int8fx compile``: a model's files in, a directory out that ``int8fx run`` starts from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from int8fx.ahead import artefact as files
from int8fx.ahead.compile import compile_model
from int8fx.analysis.explanation.record import mib
from int8fx.bench import models, smollm2
from int8fx.bench.progress import step
from int8fx.compiler.report import collect_reports
from int8fx.errors import UserError
from int8fx.passes.linears.decision import in_schemes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compiled:
    """What was made; ``print`` it with rich, or take ``to_dict``.

    Attributes:
        model, directory: from where and to where.
        linears: how many are quantised.
        schemes: theirs, each once.
        context: how many tokens the KV cache holds.
        weight_bytes, file_bytes: of the weights, and of the directory.
        made_by: what it runs on: versions and instruction sets.
    """

    model: str
    directory: str
    linears: int
    schemes: tuple[str, ...]
    context: int
    weight_bytes: int
    file_bytes: int
    made_by: dict[str, Any]

    def __rich__(self) -> Text:
        return Text(
            f"{self.linears} linears of {self.model} {in_schemes(self.schemes)}, a cache of "
            f"{self.context} tokens; the files in {self.directory} take {mib(self.file_bytes)} MiB, "
            f"the weights among them {mib(self.weight_bytes)} MiB"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_files(
    name: str | None,
    directory: Path,
    options: dict[str, Any],
    context: int | None,
    dtype: str | None,
    progress: Console,
) -> Compiled:
    """Loads a model and compiles it.

    Args:
        name: a directory, a ``.gguf`` file or a hub name; None is SmolLM2-135M-Instruct.
        directory: is made, whole or not at all; it is not there yet.
        dtype: a name of ``DTYPES``; None, as loaded.

    Raises:
        UserError: an argument is not allowed, or the model cannot be loaded or compiled, and why.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: allowed: {', '.join(DTYPES)}")
    model, tokenizer = smollm2.load(progress) if name is None else models.load(name, progress)
    if dtype is not None:
        # Buffers stay: rounded rotary frequencies would be another model's.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    shown = name or smollm2.CONVERTED
    with collect_reports() as reports, step(progress, "Compiling", 4) as update:
        done = iter(range(1, 5))
        artefact = compile_model(
            model,
            tokenizer,
            directory,
            name=shown,
            context=context,
            options=options,
            step=lambda text: update(next(done)),
        )
    sizes = {name: each["bytes"] for name, each in artefact.files.items()}
    return Compiled(
        model=shown,
        directory=str(directory),
        linears=len(reports[0].accepted),
        schemes=tuple(dict.fromkeys(each.scheme for each in reports[0].accepted)),
        context=artefact.context,
        weight_bytes=sizes[files.WEIGHTS],
        file_bytes=sum(sizes.values()),
        made_by=dict(artefact.made_by),
    )
