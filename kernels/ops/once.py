"""A value that is computed once.

    y = x        any shape and dtype, in memory of its own

Inductor computes a pointwise expression again in every kernel that reads it. The operand of an operator
that it knows nothing of is written to memory (``passes/float/compute_once.py`` says where that pays).
"""

from torch import Tensor

from int8fx.kernels.ops.library import register


def _once(x: Tensor) -> Tensor:
    return x.clone()


once = register("once(Tensor x) -> Tensor", _once, _once)
