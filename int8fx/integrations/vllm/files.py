"""Which weights of a checkpoint are in int8, by the headers of its safetensors files."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.transformers_utils.config import get_safetensors_params_metadata

from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.weights import state_dict

WEIGHT = "weight"
SCHEME = WEIGHT + state_dict.SCHEME
# Of a weight in int8 with a scale per channel: int8fx's scales, or bitsandbytes'.
SCALES = (WEIGHT + state_dict.SCALE, state_dict.BITSANDBYTES_SCALE)


@dataclass(frozen=True)
class StoredWeight:
    """How the files hold the weight of a module.

    Attributes:
        sizes: of each of its tensors, by the name behind the module's path: what follows the rows. They
            are a matrix ``[1, N, K]`` or ``[N, K]``, scales ``[N]``, and so on.
    """

    sizes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, entries: Mapping[str, Mapping[str, Any]]) -> "StoredWeight | None":
        """
        Args:
            entries: the tensors of one module, as ``FilesInInt8.read`` has them.
        """
        if SCHEME in entries:
            names = [name for name in entries if name.startswith(WEIGHT)]
        elif WEIGHT in entries and entries[WEIGHT]["dtype"] == "I8":
            # compressed-tensors writes the same names; vLLM reads those by itself.
            names = next(([WEIGHT, scale] for scale in SCALES if scale in entries), [])
        else:
            names = []
        sizes = {name: _behind_rows(entries[name]["shape"]) for name in names}
        return cls(sizes) if names else None

    @property
    def is_plain(self) -> bool:
        """Whether it is int8 with a scale per channel, whoever wrote it."""
        return SCHEME not in self.sizes

    def mismatch(self, weight_format: WeightFormat) -> str:
        """What the files hold, where a format is another; or empty."""
        if self.is_plain:
            return "" if state_dict.is_plain(weight_format) else PER_CHANNEL.name
        same = self.sizes.keys() == set(state_dict.names_of(WEIGHT, weight_format))
        return "" if same else ", ".join(sorted(self.sizes))


def _behind_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """int8fx writes matrices as ``[1, N, K]`` (``int8fx/weights/state_dict.py``)."""
    return tuple(shape[2:] if len(shape) == 3 else shape[1:])


@dataclass(frozen=True)
class FilesInInt8:
    """The modules whose weight is quantised in the files, by path.

    Attributes:
        weights: of each such module; one with a float weight is not there.
    """

    weights: Mapping[str, StoredWeight]

    @classmethod
    def of(cls, model: str, revision: str | None) -> "FilesInInt8":
        """Of a directory, or of a repository on the hub."""
        return cls.read(get_safetensors_params_metadata(model, revision=revision))

    @classmethod
    def read(cls, metadata: Mapping[str, Mapping[str, Any]]) -> "FilesInInt8":
        """
        Args:
            metadata: of each tensor, with its ``dtype`` as safetensors spells it, and its ``shape``.
        """
        modules: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for name, entry in metadata.items():
            path, _, last = name.rpartition(".")
            modules[path][last] = entry
        found = {path: StoredWeight.of(entries) for path, entries in modules.items()}
        return cls({path: stored for path, stored in found.items() if stored is not None})

    def renamed(self, mapper: Any) -> "FilesInInt8":
        """With the paths that vLLM's model has."""
        return FilesInInt8(mapper.apply_dict(dict(self.weights)))

    def any_below(self, path: str) -> bool:
        """Whether a module, or one inside of it, is quantised."""
        return any(each == path or each.startswith(f"{path}.") for each in self.weights)

    def stored(self, paths: Sequence[str]) -> StoredWeight | None:
        """How the matrices that vLLM keeps as one are written.

        Raises:
            ValueError: some of them are in int8 and others in float, or they are written differently.
        """
        found = [self.weights.get(path) for path in paths]
        if any(each != found[0] for each in found):
            both = "int8 and others in float" if None in found else "one form and others in another"
            raise ValueError(
                f"vLLM keeps {', '.join(paths)} as one matrix, and the files hold some of them in "
                f"{both}; quantise all of them alike or none"
            )
        return found[0]
