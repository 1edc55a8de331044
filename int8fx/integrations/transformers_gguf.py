"""GGUF files through transformers, kept packed.

    read_with_int8fx("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")

transformers keeps the blocks where the Hub has a kernel for them, and otherwise reads the model in
float. So it goes on reading these files until int8fx is asked to, as it does where the caller asks for
float (``GgufConfig(dequantize=True)``).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from int8fx.errors import CheckpointError
from int8fx.integrations.transformers_readers import (
    Read,
    ReaderConfig,
    ReaderQuantizer,
    in_files,
    serves,
)
from int8fx.kernels.cpu import pages
from int8fx.weights.readers import gguf
from int8fx.weights.readers.gguf_file import FLOATS, GgufFile
from int8fx.weights.readers.gguf_names import Renamed
from int8fx.weights.readers.module import StoredModule

METHOD = "gguf"


def quantizer_of(theirs: Any, config: Any, **options: Any) -> Any:
    """Who reads a GGUF file: int8fx, or transformers' class ``theirs``."""
    if serves(METHOD) and not config.dequantize:
        return GgufQuantizer(ReaderConfig(quant_method=METHOD), **options)
    return theirs(config, **options)


class GgufQuantizer(ReaderQuantizer):
    """What transformers asks while it reads such a file: the name of the file, and then its tensors."""

    file: Renamed

    def __init__(self, quantization_config: ReaderConfig, **options: Any) -> None:
        quantization_config.quant_method = METHOD  # transformers reads the file through no other
        super().__init__(quantization_config, **{**options, "pre_quantized": True})

    def read_header(self, gguf_file: str) -> None:
        """Raises:
        CheckpointError: the file is damaged, or its architecture is not known.
        """
        self.file = Renamed(GgufFile(Path(gguf_file)))

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The file has none that ``dtype="auto"`` could take."""
        return torch.get_default_dtype() if dtype is None else dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **_: Any
    ) -> None:
        """Raises:
        CheckpointError: the file does not hold a parameter of the model.
        ValueError: weights are to be read in shards.
        """
        self.refuse_shards(model)
        names = {name for name, _ in model.named_parameters()} - set(model.all_tied_weights_keys)
        for name in sorted(names):
            if in_files(name, model.base_model_prefix, self.file.entries) not in self.file.entries:
                raise CheckpointError(
                    f"{self.file.path}: {name}: in the model, and missing in the checkpoint"
                )

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Tensor]:
        """By their names in the model: floats, and the rows of blocks as they are in the file."""
        return {
            name: self.file.tensor(name) if entry.dtype in FLOATS else self.file.mapped(name)
            for name, entry in self.file.entries.items()
        }

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(list(self.patterns), "weight", [_ReadBlocks(self)])]


class _ReadBlocks(Read):
    """The rows of a weight's blocks, in the order of the model's, to the weight."""

    hf_quantizer: GgufQuantizer

    def stored(self, model: Any, name: str, tensors: dict[str, Tensor]) -> StoredModule:
        file = self.hf_quantizer.file
        found = in_files(name, model.base_model_prefix, file.entries)
        rows = {"weight": file.in_order(found, tensors["weight"])}
        kind = {gguf.TYPE: file.entries[found].dtype}
        return StoredModule(
            found.removesuffix(".weight"), rows, metadata=kind, origin=lambda entry: str(file.path)
        )

    def release(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.hf_quantizer.file.release(name)
        pages.trim_heap()
