"""Groups: up to three linears that read one activation run as one launch (q/k/v, gate/up).

Their weights stay where they are: a kernel takes three pointers, and each program picks its own. An
absent linear is given another's pointer and N = 0, so no program is made for it.
"""

from collections.abc import Sequence
from typing import TypeVar

import triton
import triton.language as tl

MAX_GROUP = 3

T = TypeVar("T")


@triton.jit
def pick(group, first, second, third):
    """The value of group 0, 1 or 2; works on pointers."""
    return tl.where(group == 0, first, tl.where(group == 1, second, third))


def padded(values: Sequence[T], absent: T | None = None) -> tuple[T, T, T]:
    """Three values from one to three; ``absent``, or the first value, stands for the missing."""
    fill = values[0] if absent is None else absent
    first, second, third = (*values, *[fill] * (MAX_GROUP - len(values)))
    return first, second, third
