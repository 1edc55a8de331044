"""``int8fx::pack_weight`` and ``int8fx::unpack_weight``: ``kernels/packing.py`` as operators.

| operator | |
|---|---|
| ``pack_weight`` | the integers ``[N, K]`` of a weight as its device's kernel takes them, a copy |
| ``unpack_weight`` | the ``[N, K]`` form of packed ones |

``family`` says which kernels read them (``kernels/table.py``).
"""

from int8fx.kernels import packing
from int8fx.kernels.ops.library import register

pack_weight = register(
    "pack_weight(Tensor w_int8, str family='int8') -> Tensor",
    packing.pack_weight,
    packing.pack_weight_fake,
)
unpack_weight = register(
    "unpack_weight(Tensor weight, SymInt N, SymInt K, str family='int8') -> Tensor",
    packing.unpack_weight,
    packing.unpack_weight_fake,
)
