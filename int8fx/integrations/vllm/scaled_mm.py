"""int8fx's product under compressed-tensors' W8A8 checkpoints, in the place of oneDNN's.

    y = (x_int8 @ w_int8ᵀ) · x_scale · w_scale + bias        x_scale per token, found at run time

That is LLM.int8() without outliers. Checkpoints with a scale for x, or a zero point, stay with vLLM's.
"""

from typing import Any

from torch import Tensor
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    register_linear_kernel,
)
from vllm.platforms import PlatformEnum, current_platform

from int8fx.integrations.vllm import product
from int8fx.integrations.vllm.modes import compiles_with_ours
from int8fx.kernels import table
from int8fx.kernels.schemes.int8 import ABSMAX_VECTOR

CHOICE = ABSMAX_VECTOR.choice()


class Int8FxScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """``VLLM_DISABLED_KERNELS=Int8FxScaledMMLinearKernel`` brings vLLM's own back."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        reason = table.refusal("cpu") if current_platform.is_cpu() else "requires a CPU"
        return reason is None, reason

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        if c.is_static_input_scheme:
            return False, "takes no scale of x from the files"
        if not c.input_symmetric:
            return False, "takes no zero point of x"
        if not c.is_channelwise:
            return False, "requires a scale per output channel"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, w_scale = layer.weight.data, layer.weight_scale.data.flatten()
        quantized = product.int8_weight(weight, w_scale.float(), CHOICE, layer.params_dtype)
        product.put(layer, quantized, compiles_with_ours())

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product.apply(layer, x, bias)


def register() -> None:
    """Puts it before vLLM's own, which takes everything."""
    served = kernels._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    if Int8FxScaledMMLinearKernel not in served:
        register_linear_kernel(Int8FxScaledMMLinearKernel, PlatformEnum.CPU, "int8")
        served.insert(0, served.pop())


def serves(quantization: Any) -> bool:
    """Whether a compressed-tensors configuration is of such checkpoints."""
    groups = quantization.target_scheme_map.values()
    return any(_is_w8a8(group.get("weights"), group.get("input_activations")) for group in groups)


def _is_w8a8(weights: Any, activations: Any) -> bool:
    """Of compressed-tensors' ``QuantizationArgs``."""
    if weights is None or activations is None:
        return False
    eight = all(each.num_bits == 8 and each.type == "int" for each in (weights, activations))
    return eight and weights.strategy == "channel" and activations.dynamic and activations.symmetric
