"""Experts of a mixture in vLLM: each row meets the matrices of its experts, in a scheme that has that.

    y[m] = Σ_j topk_weights[m, j] · w2[e] (act(w13[e] x[m])),   e = topk_ids[m, j]

A row's result depends on the row alone where the scheme's does (``"token"``, ``"static"``, rotated).
Under tensor parallelism vLLM cuts w2 along K and sums: the result is then as exact, and not the same
bit for bit.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase

from int8fx.integrations.vllm.linears import DONE
from int8fx.kernels import table
from int8fx.kernels.ops.expert_linear import expert_linear
from int8fx.kernels.schemes.scheme import Choice


class ExpertsMethod(OnlineMoEMethodBase):
    """
    Args:
        moe: vLLM's configuration of the layer.
        choices: the scheme and its settings of ``w13`` and of ``w2``, which a calibration gives columns
            of their own.

    Raises:
        ValueError: the layer has what this method does not serve.
    """

    def __init__(self, moe: Any, choices: Mapping[str, Choice]) -> None:
        super().__init__(moe)
        if moe.has_bias:
            raise ValueError("int8fx in vLLM: experts with biases; leave them in float with `skip`")
        if moe.moe_parallel_config.use_ep:
            raise ValueError("int8fx in vLLM: expert parallelism; use tensor parallelism instead")
        if moe.moe_parallel_config.tp_size > 1 and getattr(choices["w2"].settings, "columns", ()):
            raise ValueError(
                "int8fx in vLLM: experts with columns of a calibration on several processes, each of "
                "which has some of K; leave them in float (skip), or give them a rule with columns=0"
            )
        self.choices = choices

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        setattr(layer, DONE, True)
        for name, choice in self.choices.items():
            floats = getattr(layer, f"{name}_weight")
            for part, tensor in zip(_parts(name, choice), choice.quantize(floats.data), strict=True):
                layer.register_buffer(part, tensor, persistent=False)
            # vLLM takes the dtype and the device from here.
            floats.data = floats.data.new_empty(0)
        self.expert_linear = table.experts(floats.device.type) or expert_linear

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        M, top_k = topk_ids.shape
        weights = topk_weights.to(torch.float32).reshape(M, top_k, 1)
        rows = x.repeat_interleave(top_k, 0)
        if layer.apply_router_weight_on_input:
            rows = (rows * weights.reshape(-1, 1)).to(x.dtype)
        experts = topk_ids.reshape(-1)
        hidden = self._product(layer, "w13", rows, experts)
        width = hidden.shape[1] // 2 if layer.activation.is_gated else hidden.shape[1]
        active = apply_moe_activation(layer.activation, hidden.new_empty(len(hidden), width), hidden)
        y = self._product(layer, "w2", active, experts).reshape(M, top_k, -1)
        if layer.apply_router_weight_on_input:
            return y.sum(1)
        return (y * weights).sum(1).to(x.dtype)

    def _product(self, layer: Any, name: str, x: Tensor, experts: Tensor) -> Tensor:
        choice = self.choices[name]
        parts = [getattr(layer, part) for part in _parts(name, choice)]
        return choice.lower_experts(self._call, x, parts, (experts, None))

    def _call(self, target: Callable[..., Any], *args: Any) -> Any:
        """The device's own operator in the place of ``expert_linear``."""
        return (self.expert_linear if target is expert_linear else target)(*args)


def _parts(name: str, choice: Choice) -> list[str]:
    """The buffers of a packed weight."""
    return [f"int8fx_{name}_{part}" for part in choice.weight_format.packed_names]
