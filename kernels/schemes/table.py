"""All schemes, by name.

A new one is a file beside this one, and a row here (``kernels/README.md``). From the row on options,
rules, reports, ``explain``, ``evaluate``, the command, ``quantize_`` and checkpoints know it. The tests
take their cases from this table: ``tests/test_schemes.py`` holds its lowering against its reference,
``tests/test_third_party_scheme.py`` takes its weights through everything, and ``tests/gpuless`` has the
GPU path.
"""

import html
from collections.abc import Callable
from typing import Any

from int8fx.kernels.schemes import affine, grouped, int8, rotated, row_groups, weight_only
from int8fx.kernels.schemes.scheme import Scheme

DEFAULT = int8.LLM_INT8.name


class Schemes(dict[str, Scheme]):
    """Schemes by name, which print as a line each.

    Examples:
        >>> import int8fx
        >>> int8fx.SCHEMES["w8a16"].formula
        'x as it is, per-channel w'
    """

    def __missing__(self, name: Any) -> Scheme:
        raise KeyError(f"{name!r} is no scheme; there are {', '.join(map(repr, self))}")

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {scheme.formula}" for name, scheme in self.items())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(scheme.formula)}</td>"
            f"<td>{html.escape(', '.join(sorted(scheme.reads)))}</td></tr>"
            for name, scheme in self.items()
        )
        head = "<tr><th>scheme</th><th>formula</th><th>settings</th></tr>"
        return f"<table>{head}{rows}</table>"


SCHEMES = Schemes(
    (scheme.name, scheme)
    for scheme in (
        int8.LLM_INT8,
        affine.LLM_INT8_ZEROPOINT,
        affine.ABSMAX_TENSOR,
        int8.ABSMAX_ROW,
        int8.ABSMAX_VECTOR,
        affine.ZEROPOINT_TENSOR,
        affine.ZEROPOINT_VECTOR,
        rotated.INT8_ROTATED,
        weight_only.W8A16,
        weight_only.W8A16_GROUP,
        grouped.W4A16_GROUP,
        grouped.W4A8_GROUP,
        grouped.WNA16_GROUP,
        grouped.NF4,
    )
)
# Of weights that other systems made: files have them, and no option names them.
OF_FILES = Schemes({row_groups.WNA16_ROWS.name: row_groups.WNA16_ROWS})


# What follows is read at each compile: a row may be added at any time.


def quantizers() -> frozenset[Any]:
    """The operators whose equal calls the linears of one input share."""
    return frozenset(scheme.quantizer for scheme in SCHEMES.values()) - {None}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators that Inductor is given to fuse instead of a call, and what they are made of."""
    return {
        operator: decomposed
        for scheme in SCHEMES.values()
        for operator, decomposed in scheme.decompositions.items()
    }


def scheme_named(name: str) -> Scheme:
    """Raises:
    ValueError: there is none of that name; names those that there are.
    """
    if name in OF_FILES:
        return OF_FILES[name]
    if name not in SCHEMES:
        known = ", ".join(map(repr, SCHEMES))
        raise ValueError(
            f"scheme {name!r} is not in int8fx.SCHEMES, which has {known}; a package that adds one is "
            "imported first"
        )
    return SCHEMES[name]
