"""Models that bitsandbytes quantised (``load_in_8bit=True``), compiled with ``backend="llmint8"``::

    import int8fx.integrations.bitsandbytes
    model = torch.compile(model.eval(), backend="llmint8", fullgraph=True)

bitsandbytes' operators return a list of outlier columns, whose length only the data tells. Dynamo
breaks the graph there, twice a linear, unless it may trace such operators: importing this module
allows that, for this process, and logs it: Dynamo asks before it calls any backend, so nothing narrower
would do. What the backend makes of them is in ``passes/linears/bitsandbytes_nodes.py``.

Checkpoints need nothing from here: ``weight`` and ``SCB`` are read by ``load_state_dict`` and
``int8fx.load_checkpoint`` (``int8fx/weights/state_dict.py``), and ``to_bitsandbytes`` writes them.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from int8fx.kernels.ops.quantize_reference import QMAX
from int8fx.torch_private import trace_operators_of_dynamic_shape
from int8fx.weights.state_dict import BITSANDBYTES_FORMAT, BITSANDBYTES_SCALE, SCALE

log = logging.getLogger(__name__)

trace_operators_of_dynamic_shape()
log.info("torch._dynamo.config.capture_dynamic_output_shape_ops is on in this process")


def to_bitsandbytes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of an int8 model as bitsandbytes and transformers read it.

    ``weight`` gets the shape of the parameter, ``weight_scale`` becomes ``SCB`` = 127 · w_scale, and
    ``weight_format`` says row-major.

    Raises:
        TypeError: the state is no dict, as a model is none.
        ValueError: an int8 entry is not a module's ``weight``, the only name bitsandbytes knows.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"to_bitsandbytes: given {type(state).__name__}; allowed: a dict of tensors, as "
            "model.state_dict()"
        )
    translated = {}
    for name, tensor in state.items():
        key = name.removesuffix(SCALE)
        if key + SCALE not in state or getattr(state.get(key), "dtype", None) != torch.int8:
            translated[name] = tensor
            continue
        owner, _, attribute = key.rpartition(".")
        if attribute != "weight":
            raise ValueError(f"{key}: bitsandbytes keeps int8 values under 'weight' only")
        prefix = f"{owner}." if owner else ""
        if name == key:
            translated[name] = tensor.reshape(tensor.shape[-2:])
            continue
        translated[prefix + BITSANDBYTES_SCALE] = tensor * QMAX
        translated[prefix + BITSANDBYTES_FORMAT] = torch.tensor(0, dtype=torch.uint8)
    return translated
