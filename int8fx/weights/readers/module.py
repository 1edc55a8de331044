"""What a file holds of one module, and the checks that all readers share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from int8fx.errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one module as they are in the file.

    Attributes:
        path: of the module.
        tensors: by their names behind the module's: ``qweight``, ``weight.absmax``.
        shape: ``(N, K)`` of the weight, where the model is known that it is for.
        kind: the name of the module's class, as far as it is known.
        metadata: what the header of the file says beside its tensors.
        origin: the file of an entry, for messages.
    """

    path: str
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int] | None = None
    kind: str = "Linear"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: Callable[[str], str] = lambda entry: ""

    def name(self, entry: str) -> str:
        """The full name of an entry, behind its file's."""
        full = f"{self.path}.{entry}" if self.path else entry
        origin = self.origin(entry)
        return f"{origin}: {full}" if origin else full

    def error(self, entry: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name(entry)}: {what}")

    def has(self, entry: str) -> bool:
        return entry in self.tensors

    def take(
        self, entry: str, dtypes: torch.dtype | Sequence[torch.dtype], *shape: int | None
    ) -> Tensor:
        """An entry, checked.

        Args:
            shape: a size, or None for any, for each dimension; nothing: any shape.

        Raises:
            CheckpointError: it is missing, or of another dtype or shape.
        """
        if entry not in self.tensors:
            raise self.error(entry, "missing in the checkpoint")
        tensor = self.tensors[entry]
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise self.error(entry, f"{tensor.dtype} in the checkpoint; allowed: {names}")
        if shape and not _fits(tensor.shape, shape):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(entry, f"shape {list(tensor.shape)} in the checkpoint, [{sizes}] expected")
        return tensor

    def check_matrix(self, entry: str, N: int, K: int) -> None:
        """Whether an entry is of the weight that the model has.

        Raises:
            CheckpointError: it is not.
        """
        if self.shape is not None and self.shape != (N, K):
            raise self.error(
                entry, f"of a weight {[N, K]} in the checkpoint, {list(self.shape)} in the model"
            )

    def take_floats(self, entry: str, *shape: int | None) -> Tensor:
        """The same of floats; all of them are finite.

        Raises:
            CheckpointError: as ``take``, or one is not finite.
        """
        tensor = self.take(entry, FLOATS, *shape)
        if not tensor.is_meta and not tensor.isfinite().all():
            raise self.error(entry, "corrupt: a value that is not finite")
        return tensor

    def take_groups(self, entry: str, K: int, groups: int) -> Tensor:
        """The group of each column, ``[K]`` int32.

        Raises:
            CheckpointError: as ``take``, or one names a group that there is none of.
        """
        g_idx = self.take(entry, (torch.int32, torch.int64), K).to(torch.int32)
        if not g_idx.is_meta and K and not bool(((g_idx >= 0) & (g_idx < groups)).all()):
            raise self.error(entry, f"corrupt: a group outside of 0 to {groups - 1}")
        return g_idx


def _fits(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(
        size is None or size == is_ for is_, size in zip(found, wanted, strict=True)
    )
