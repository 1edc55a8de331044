"""Weights of a few bits by groups of rows, with activations as they are: y = x ŵᵀ + bias.

ŵ is that of ``kernels/formats/row_groups.py``. No kernel serves it: it is de-quantised at each call.
"""

from dataclasses import dataclass

from int8fx.kernels.formats.grouped import ZEROS
from int8fx.kernels.formats.row_groups import row_groups
from int8fx.kernels.schemes.scheme import Scheme
from int8fx.kernels.schemes.settings import multiple_of, one_of, setting, whole_number


@dataclass(frozen=True)
class RowGroups:
    """Attributes:
    bits: of a code.
    group_size: how many weights of a column share a scale.
    zeros: which code stands for 0, by a name of ``kernels/formats/grouped.py``.
    """

    bits: int = setting(4, whole_number(1, 8))
    group_size: int = setting(64, multiple_of(8))
    zeros: str = setting("float", one_of(*ZEROS))


WNA16_ROWS = Scheme(
    "wna16-rows",
    "x as it is, w in 1 to 8 bits by groups of group_size rows",
    "HQQ, axis 0",
    lambda settings: row_groups(settings.bits, settings.group_size, settings.zeros),
    RowGroups,
)
