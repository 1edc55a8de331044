"""vLLM's output head: in float by default, as everywhere; in int8 where the options do not skip it."""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from int8fx.integrations.vllm import product
from int8fx.kernels.schemes.scheme import Choice


class HeadMethod(UnquantizedEmbeddingMethod):
    """
    Args:
        choice: the scheme and its settings; None: the head stays in float.
    """

    def __init__(self, choice: Choice | None) -> None:
        self.choice = choice

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.choice is None:
            super().process_weights_after_loading(layer)
            return
        # vLLM calls the head outside of what it compiles. An embedding may share the weight: it stays.
        layer.int8fx = product.of_float(layer.weight.data, self.choice)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.choice is None:
            return super().apply(layer, x, bias)
        return layer.int8fx(x, bias)
