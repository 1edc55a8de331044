"""A value that is computed once.

    y = x        any shape and dtype, in memory of its own

Inductor computes a pointwise expression again in every kernel that reads it. The operand of an operator
that it knows nothing of is written to memory (``passes/float/compute_once.py`` says where that pays).
"""

import torch
from torch import Tensor

_library = torch.library.Library("int8fx", "FRAGMENT")
_library.define("once(Tensor x) -> Tensor")
once = torch.ops.int8fx.once.default


def _once(x: Tensor) -> Tensor:
    return x.clone()


_library.impl("once", _once, "CompositeExplicitAutograd")
torch.library.register_fake("int8fx::once", _once, lib=_library)
