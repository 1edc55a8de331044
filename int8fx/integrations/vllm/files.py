"""Which weights of a checkpoint are in int8, by the headers of its safetensors files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm.transformers_utils.config import get_safetensors_params_metadata

from int8fx.weights.state_dict import keys_beside


class Kind(Enum):
    """How a weight in int8 is written: the suffix of its scales beside ``weight``, and their factor.

    OURS       ``weight [1, N, K]`` and ``weight_scale [N]``
    BITSANDBYTES  ``weight [N, K]`` and ``SCB [N]``, which is 127 times the scale
    """

    OURS = "weight_scale"
    BITSANDBYTES = "SCB"


@dataclass(frozen=True)
class FilesInInt8:
    """The modules whose weight is int8 in the files, by path.

    Attributes:
        kinds: of each module with an int8 weight; a module with a float weight is not there.
    """

    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, model: str, revision: str | None) -> "FilesInInt8":
        """Of a directory, or of a repository on the hub."""
        return cls.read(get_safetensors_params_metadata(model, revision=revision))

    @classmethod
    def read(cls, metadata: Mapping[str, Mapping[str, Any]]) -> "FilesInInt8":
        """
        Args:
            metadata: of each tensor, with its ``dtype`` as safetensors spells it.
        """
        found = {}
        for name, entry in metadata.items():
            path, _, last = name.rpartition(".")
            if last != "weight" or entry["dtype"] != "I8":
                continue
            ours, of_bitsandbytes, _ = keys_beside(name)
            # compressed-tensors writes the same names; vLLM reads those by itself.
            if of_bitsandbytes in metadata:
                found[path] = Kind.BITSANDBYTES
            elif ours in metadata:
                found[path] = Kind.OURS
        return cls(found)

    def renamed(self, mapper: Any) -> "FilesInInt8":
        """With the paths that vLLM's model has."""
        return FilesInInt8(mapper.apply_dict(dict(self.kinds)))

    def any_below(self, path: str) -> bool:
        """Whether a module, or one inside of it, is in int8."""
        return any(each == path or each.startswith(f"{path}.") for each in self.kinds)

    def kind_of(self, paths: Sequence[str]) -> Kind | None:
        """How the matrices that vLLM keeps as one are written.

        Raises:
            ValueError: some of them are in int8, and others in float.
        """
        kinds = {self.kinds.get(path) for path in paths}
        if len(kinds) > 1:
            raise ValueError(
                f"vLLM keeps {', '.join(paths)} as one matrix, and the files hold some of them in "
                "int8 and others in float; quantise all of them or none"
            )
        return kinds.pop()
