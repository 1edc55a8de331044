"""The options of ``int8fx.quantize_`` by their names and types, for type checkers and editors.

What they mean is said in ``int8fx/options.py``, and of settings beside each scheme. Schemes of other
packages may have more settings: ``quantize_`` takes them, and a type checker does not know them.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict

from int8fx.calibration import Calibration


class QuantizeOptions(TypedDict, total=False):
    """Every option of ``quantize_``, and every setting of a scheme of ``int8fx.SCHEMES``."""

    scheme: str
    rules: Sequence[tuple[str, str] | tuple[str, str, Mapping[str, Any]]]
    skip: Sequence[str]
    only: Sequence[str]
    calibration: Calibration | str | PathLike[str]
    threshold: float
    decomposition: str
    columns: int | Sequence[int]
    group_size: int
    block: int
    rotation: str
    bits: int
    zeros: str
    act_order: bool
    column_scale: bool
    quant_type: str
    blocksize: int
    double_quant: bool
