"""``int8fx quantize``: a model's files in, quantised files out, as transformers reads them back."""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from int8fx.analysis.explanation.record import mib
from int8fx.bench import models
from int8fx.bench.progress import step
from int8fx.cli.method import NEAREST, Chosen
from int8fx.errors import QUANTISED, UserError
from int8fx.integrations.transformers import Int8FxConfig
from int8fx.passes.linears.decision import in_schemes
from int8fx.weights.quantize import quantize_
from int8fx.weights.tensor import QuantizedWeight


@dataclass(frozen=True)
class Saved:
    """What was written; ``print`` it with rich, or take ``to_dict``.

    Attributes:
        model, directory: from where and to where.
        linears: how many weights are quantised now.
        schemes: theirs, each once.
        model_bytes: of all parameters and buffers, in memory.
        file_bytes: of the directory.
    """

    model: str
    directory: str
    linears: int
    schemes: tuple[str, ...]
    model_bytes: int
    file_bytes: int

    def __rich__(self) -> Text:
        return Text(
            f"{self.linears} linears of {self.model} {in_schemes(self.schemes)}; the model takes "
            f"{mib(self.model_bytes)} MiB, its files in {self.directory} {mib(self.file_bytes)} MiB"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize_files(name: str, directory: Path, how: Chosen, progress: Console) -> Saved:
    """Loads a model straight into int8, or quantises it in place, and saves it with its tokenizer.

    Args:
        name: a directory or a hub name.
        directory: is made, whole or not at all; it is not there yet.
        how: the options of ``int8fx.quantize_``, and its algorithm.

    Raises:
        UserError: the model cannot be loaded, or the directory cannot be made, and why.
    """
    model, tokenizer = _quantised(name, how, progress)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with step(progress, f"Writing {directory}"), models.quiet_transformers():
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=directory.parent))
            try:
                made = unfinished / directory.name
                model.save_pretrained(made)
                tokenizer.save_pretrained(made)
                made.replace(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"OUT {directory}: {error}") from error
    weights = [each for each in model.parameters() if isinstance(each, QuantizedWeight)]
    return Saved(
        model=name,
        directory=str(directory),
        linears=len(weights),
        schemes=tuple(dict.fromkeys(each.choice.scheme.name for each in weights)),
        model_bytes=model.get_memory_footprint(),
        file_bytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    )


def _quantised(name: str, how: Chosen, progress: Console) -> tuple[Any, Any]:
    """An algorithm asks for the float model; without one, no weight is ever in float beside others.

    Raises:
        UserError: its weights are quantised already.
    """
    if how.method == NEAREST:
        config = Int8FxConfig(**how.options)
        model, tokenizer = models.load(name, progress, quantization_config=config)
        if model.hf_quantizer.pre_quantized:
            raise UserError(f"MODEL {name}{QUANTISED}")
        return model, tokenizer
    model, tokenizer = models.load(name, progress)
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(f"MODEL {name}{QUANTISED}")
    batches = how.batches(tokenizer, model.device)
    with step(progress, f"Quantising by {how.method}", counted=True) as update:
        quantize_(model, method=how.method, batches=batches, on_weight=update, **how.options)
    return model, tokenizer
