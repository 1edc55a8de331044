"""What became of each linear or matmul: rewritten, or left alone for a reason a person can read."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """The end of one candidate.

    Attributes:
        path: the module path of the weight (``model.layers.0.mlp.up_proj``), or the FX node's name
            when no weight is involved.
        spelling: what the model wrote, as ``torch.nn.functional.linear``.
        shape: ``(N, K)`` of the weight, of each of them when there are ``experts``; None when it is
            no matrix.
        accepted: whether it was rewritten.
        reason: why it was not; empty when it was.
        scheme: by which it was rewritten, a name of ``int8fx.SCHEMES``; empty when it was not.
        note: how its product is computed, where no kernel does; else empty.
        experts: how many matrices the weight holds, of which each row meets one; 0 for a linear.
    """

    path: str
    spelling: str
    shape: tuple[int, int] | None
    accepted: bool
    reason: str = ""
    scheme: str = ""
    experts: int = 0
    note: str = ""

    def __str__(self) -> str:
        how = f" ({self.note})" if self.note else ""
        what = f"{self.scheme}{how}" if self.accepted else f"left alone: {self.reason}"
        experts = f"E={self.experts}, " if self.experts else ""
        size = "" if self.shape is None else f" [{experts}N={self.shape[0]}, K={self.shape[1]}]"
        return f"{self.path}{size} {self.spelling}: {what}"


def in_schemes(names: Iterable[str]) -> str:
    """How weights are kept, for a sentence: ``in llm.int8``, or ``in llm.int8 and w4a16-group``."""
    *others, last = dict.fromkeys(names) or [""]
    if not last:
        return "quantised"
    return f"in {', '.join(others)} and {last}" if others else f"in {last}"
