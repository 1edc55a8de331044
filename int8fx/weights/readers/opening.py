"""Opens a checkpoint by what its path says. Nothing of a file is executed: pickles are refused."""

from pathlib import Path

from int8fx.errors import CheckpointError
from int8fx.weights.readers.container import Container
from int8fx.weights.readers.gguf_file import GgufFile
from int8fx.weights.readers.safetensors_files import Safetensors

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def opened(path: Path) -> Container:
    """Raises:
    CheckpointError: a file is damaged, or a pickle.
    FileNotFoundError: there is no checkpoint.
    """
    if path.is_file() and path.suffix == ".gguf":
        return GgufFile(path)
    if path.is_file() and path.suffix in _PICKLES:
        raise CheckpointError(f"{path}: a pickle, which can run code; safetensors and GGUF are read")
    return Safetensors(path)
