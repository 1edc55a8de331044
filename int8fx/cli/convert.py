"""``int8fx convert``: a checkpoint of another system, in another format."""

from pathlib import Path
from typing import Any

from rich.console import Console

from int8fx.bench.progress import step
from int8fx.errors import UserError
from int8fx.weights.readers import converting


def convert_files(source: Path, out: Path, to: str, progress: Console) -> converting.Converted:
    """Converts with a bar.

    Raises:
        UserError: the format is unknown, the source is damaged, or the target cannot hold it.
    """
    if to not in converting.TARGETS:
        raise UserError(f"--to {to}: allowed: {', '.join(converting.TARGETS)}")
    config = _config_of_gguf(source) if source.suffix == ".gguf" else None
    try:
        with step(progress, f"Converting {source}", counted=True) as update:
            return converting.convert(source, out, to, config, update)
    except FileNotFoundError as error:
        raise UserError(f"SRC {source}: {error}") from error
    except OSError as error:
        raise UserError(f"DST {out}: {error}") from error


def _config_of_gguf(source: Path) -> dict[str, Any]:
    """A GGUF file has its model's configuration under names of its own, which transformers knows."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.parent, gguf_file=source.name).to_dict()
