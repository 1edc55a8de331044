"""The table of algorithms: what each asks for, and which schemes it serves.

| method | needs | the scheme's settings |
|---|---|---|
| ``rtn`` | nothing | any scheme: round-to-nearest as the scheme's format has it |
| ``hqq`` | nothing | ``zeros="float"`` |
| ``gptq`` | batches | those with groups |
| ``awq`` | batches | ``column_scale=True`` |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from int8fx.kernels.schemes.grouped import Groups
from int8fx.kernels.schemes.scheme import Choice
from int8fx.weights.algorithms.awq import awq
from int8fx.weights.algorithms.gptq import gptq
from int8fx.weights.algorithms.grid import Codes, Grid
from int8fx.weights.algorithms.hqq import hqq

NEAREST = "rtn"


@dataclass(frozen=True)
class Method:
    """One algorithm.

    Attributes:
        solve: ``(matrix [N, K] fp32, mean of x xᵀ [K, K] or None, grid)`` to its codes.
        needs_batches: whether it asks for that mean.
        settings: what a scheme's settings have to be, by name.
    """

    solve: Callable[[Tensor, Any, Grid], Codes]
    needs_batches: bool
    settings: dict[str, Any]

    def refusal(self, choice: Choice) -> str:
        """Why it does not serve a scheme with its settings, or empty."""
        if not isinstance(choice.settings, Groups):
            return f"scheme {choice.scheme.name!r} has no groups along K"
        for name, value in self.settings.items():
            given = getattr(choice.settings, name, None)
            if given != value:
                return f"{name}={given!r}; allowed: {name}={value!r}"
        return ""


METHODS: dict[str, Method] = {
    "hqq": Method(lambda matrix, mean, grid: hqq(matrix, grid), False, {"zeros": "float"}),
    "gptq": Method(gptq, True, {}),
    "awq": Method(awq, True, {"column_scale": True}),
}


def method_named(name: Any) -> Method | None:
    """None of round-to-nearest, which is the format's own.

    Raises:
        ValueError: there is none of that name; names those that there are.
    """
    if name == NEAREST:
        return None
    if name not in METHODS:
        known = ", ".join(map(repr, (NEAREST, *METHODS)))
        raise ValueError(f"quantize_: method={name!r}; allowed: {known}")
    return METHODS[name]
