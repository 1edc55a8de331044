"""What came of a pass: how many places it changed, and why it left others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """What came of a pass in a whole compile.

    Attributes:
        name: of the pass, in ``passes/order.py``.
        changed: how many places it rewrote; the pass says what it counts.
        refused: of the places that it looked at and left: why, and how many, the commonest first.
        skipped: why it did not run, or empty.
    """

    name: str
    changed: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    skipped: str = ""

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to say: it found no place to look at."""
        return not (self.changed or self.refused or self.skipped)

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: not run, {self.skipped}"
        left = [f"{count} x {reason}" for reason, count in self.refused.items()]
        return f"{self.name}: {self.changed} changed" + (f"; left {', '.join(left)}" if left else "")


def together(outcomes: Sequence[Sequence[Outcome]]) -> tuple[Outcome, ...]:
    """The outcomes of several compiles as those of one, a pass each."""
    by_name: dict[str, list[Outcome]] = {}
    for each in (each for compiled in outcomes for each in compiled):
        by_name.setdefault(each.name, []).append(each)
    return tuple(_sum(name, members) for name, members in by_name.items())


def _sum(name: str, members: Sequence[Outcome]) -> Outcome:
    ran = [each for each in members if not each.skipped]
    if not ran:
        return members[0]
    refused = sum((Counter(each.refused) for each in ran), Counter[str]())
    return Outcome(name, sum(each.changed for each in ran), dict(refused.most_common()))
