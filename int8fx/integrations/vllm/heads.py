"""vLLM's output head: in float by default, as everywhere; in int8 where the options do not skip it, or
where the files have it so."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from int8fx.integrations.vllm import product, stored_parts
from int8fx.integrations.vllm.files import SCALES, StoredWeight
from int8fx.integrations.vllm.product import Product
from int8fx.kernels.schemes.scheme import Choice


class HeadMethod(UnquantizedEmbeddingMethod):
    """
    Args:
        choice: the scheme and its settings; None: the head stays in float.
        in_files: how the files hold the weight if it is quantised there; None: it is in float.
    """

    def __init__(self, choice: Choice | None, in_files: StoredWeight | None = None) -> None:
        self.choice = choice
        self.in_files = in_files

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        if self.choice is None or self.in_files is None:
            sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
            super().create_weights(layer, *sizes, params_dtype, **attributes)
            return
        N, K = sum(output_partition_sizes), input_size_per_partition
        like = stored_parts.on_meta(N, K, self.choice, params_dtype)
        loader = attributes.pop("weight_loader")
        stored_parts.create(layer, like, self.in_files, loader)
        for name in self.in_files.sizes:
            set_weight_attrs(getattr(layer, name), attributes)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Raises:
        ValueError: the files hold the head in int8, and the model has it from its embedding.
        """
        if self.in_files is not None:
            raise ValueError(
                f"{layer.prefix} is in int8 in the files, and the model ties it to its embedding, "
                "which is in float"
            )
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.choice is None:
            super().process_weights_after_loading(layer)
        elif self.in_files is None:
            # vLLM calls the head outside of what it compiles. An embedding may share the weight: it
            # stays.
            weight = layer.weight.data
            layer.int8fx = Product(product.quantized(weight, self.choice, weight.shape[:1]))
        else:
            self._fill_scales(layer)
            product.put(layer, stored_parts.take(layer), fused=False)

    def _fill_scales(self, layer: Any) -> None:
        """vLLM pads the vocabulary with rows of zeros, and a scale is above 0."""
        for name in SCALES:
            if name in layer._parameters:
                getattr(layer, name).data[layer.num_org_embeddings_per_partition :] = 1

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.choice is None:
            return super().apply(layer, x, bias)
        return layer.int8fx(x, bias)
