"""The setting ``columns``: which columns of x stay in 16-bit, the same ones for every token.

As an option of the user it may be a number: so many of a calibration's (``int8fx.calibrate``).
"""

from collections.abc import Sequence
from typing import Any

from int8fx.kernels.schemes.settings import NotAllowed

# In the kernel table: of rows that are rotated, and of rows with outliers beside the columns.
OPERATOR, BESIDE_OUTLIERS = "rotated_linear", "linear_beside_columns"
MOST_COLUMNS = 64  # that a linear may keep, and a calibration has
CALIBRATED_COLUMNS = 8  # that it keeps by default where there is a calibration


def static_columns(value: Any) -> int | tuple[int, ...]:
    """Which columns, ascending; or how many of a calibration's.

    Raises:
        NotAllowed: says what is allowed.
    """
    allowed = f"how many of a calibration's columns, 0 to {MOST_COLUMNS}, or their ascending numbers"
    if isinstance(value, bool) or not isinstance(value, (int, tuple, list)):
        raise NotAllowed(allowed)
    if isinstance(value, int):
        if not 0 <= value <= MOST_COLUMNS:
            raise NotAllowed(allowed)
        return value or ()
    numbers = all(type(column) is int and column >= 0 for column in value)
    if not numbers or len(value) > MOST_COLUMNS or list(value) != sorted(set(value)):
        raise NotAllowed(allowed)
    return tuple(value)


def which(settings: Any) -> tuple[int, ...]:
    """The columns' numbers.

    Raises:
        ValueError: the settings say how many, and not which.
    """
    if isinstance(settings.columns, int):
        raise ValueError(
            f"columns={settings.columns} needs a calibration that says which; give their numbers"
        )
    return settings.columns


def operands(packed: Sequence[Any]) -> tuple[Any, ...]:
    """What ``kernels/ops/rotated_linear.py`` takes of a weight packed by ``formats/rotated.py``."""
    w_int8, w_scale, _, w_columns, columns = packed
    return w_int8, w_scale, w_columns, columns
