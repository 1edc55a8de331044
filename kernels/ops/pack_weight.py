"""``int8fx::pack_weight`` and ``int8fx::unpack_weight``: ``kernels/packing.py`` as operators.

| operator | |
|---|---|
| ``pack_weight`` | ``w_int8 [N, K]`` in the form that its device's kernel takes, a copy |
| ``unpack_weight`` | the ``[N, K]`` form of a packed weight |
"""

from int8fx.kernels.ops.library import register
from int8fx.kernels.packing import _pack_weight, _pack_weight_fake, _unpack_weight, _unpack_weight_fake

pack_weight = register("pack_weight(Tensor w_int8) -> Tensor", _pack_weight, _pack_weight_fake)
unpack_weight = register(
    "unpack_weight(Tensor weight, SymInt N, SymInt K) -> Tensor", _unpack_weight, _unpack_weight_fake
)
