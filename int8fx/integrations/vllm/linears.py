"""vLLM's linears in int8.

A float weight is quantised as soon as it is loaded, and an int8 one is packed: no second weight is in
memory meanwhile. A merged matrix (q, k and v; gate and up) is one: scales are per row. A format with
one scale for a whole matrix has one for each of those.

**Tensor parallel.** vLLM cuts the weights of down and output projections along K, and adds the products
of all processes. A token's scale and an outlier's column are of a whole row of x, so that would change
the result with the number of processes. Here such a weight is cut along N instead, x is gathered, and
each process computes its part of the outputs:

    y[:, n0:n1] = int8_linear(gather(x), weight[n0:n1])        y = gather(y[:, n0:n1])

Each output is computed by one process from whole rows, bit for bit as by a single one. What travels is
as much as vLLM's own sum of products: x once, y once, each a part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from int8fx.integrations.vllm import product, stored_parts
from int8fx.integrations.vllm.files import StoredWeight
from int8fx.integrations.vllm.stored_parts import Loader
from int8fx.kernels.schemes.scheme import Choice

# vLLM processes a layer that was on the meta device when its weights are loaded, and all layers at the
# end. It takes this mark away where weights are loaded anew.
DONE = "_already_called_process_weights_after_loading"


@register_weight_loader_v2_supported_method
class Int8FxLinearMethod(LinearMethodBase):
    """
    Args:
        choice: the scheme and its settings.
        in_files: how the files hold the weight if it is quantised there; None: it is in float.
        fused: whether the backend ``llmint8`` compiles the model, and so rewrites what it finds.
    """

    def __init__(self, choice: Choice, in_files: StoredWeight | None, fused: bool) -> None:
        self.choice = choice
        self.in_files = in_files
        self.fused = fused
        # vLLM materialises a layer from the meta device when all of its weights were read.
        self.uses_meta_device = in_files is None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Loader,
        **attributes: Any,
    ) -> None:
        """Raises:
        ValueError: the weight cannot be cut for as many processes as there are.
        """
        N, K = sum(output_partition_sizes), input_size_per_partition
        layer.int8fx_gathers = _gathers(layer)
        if layer.int8fx_gathers:
            if output_size % layer.tp_size:
                raise ValueError(
                    f"{layer.prefix}: {output_size} outputs cannot be cut for {layer.tp_size} processes"
                )
            N, K = output_size // layer.tp_size, input_size
            weight_loader = _rows_of(layer)
            layer.int8fx_is_summed_later, layer.reduce_results = not layer.reduce_results, False
        elif input_size != K:
            self._check_cut(layer)
        layer.logical_widths = [N] if layer.int8fx_gathers else output_partition_sizes
        if self.in_files is None:
            self._create_float(layer, N, K, params_dtype, weight_loader)
        else:
            like = stored_parts.on_meta(N, K, self.choice, params_dtype)
            stored_parts.create(layer, like, self.in_files, weight_loader)

    def _check_cut(self, layer: Any) -> None:
        """Raises:
        ValueError: each process is to have some of the K columns, and the scheme is about all.
        """
        columns = getattr(self.choice.settings, "columns", ())
        if columns or not (self.in_files is None or self.in_files.is_plain):
            what = "columns of a calibration" if columns else "files of its scheme"
            raise ValueError(
                f"{layer.prefix}: adapters on several processes have vLLM cut its weight along K, and "
                f"{what} are of all of K; leave it in float (skip), or start without adapters"
            )

    def _create_float(self, layer: Any, N: int, K: int, dtype: torch.dtype, loader: Loader) -> None:
        weight = torch.empty(N, K, dtype=dtype, device="meta")
        parameter = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", parameter)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        setattr(layer, DONE, True)
        if self.in_files is None:
            weight = product.quantized(layer.weight.data, self.choice, layer.logical_widths)
        else:
            weight = stored_parts.take(layer)
        product.put(layer, weight, self.fused)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not layer.int8fx_gathers:
            return product.apply(layer, x, bias)
        rows = layer.output_size // layer.tp_size
        start = layer.tp_rank * rows
        if layer.bias is not None and not layer.skip_bias_add:  # what is given, the first process has
            bias = layer.bias[start : start + rows]
        y = product.apply(layer, tensor_model_parallel_all_gather(x), bias)
        if layer.int8fx_is_summed_later:
            return F.pad(y, (start, layer.output_size - start - rows))
        return tensor_model_parallel_all_gather(y)


def _gathers(layer: nn.Module) -> bool:
    """Whether x is gathered, and the weight is cut along N, where vLLM cuts along K.

    An adapter's part is cut along K, too, and vLLM adds both before it sums over the processes.
    """
    config = get_current_vllm_config_or_none()
    has_adapters = config is not None and config.lora_config is not None
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and not has_adapters


def _rows_of(layer: Any) -> Loader:
    def load_rows(param: Tensor, loaded_weight: Tensor) -> None:
        rows = param.shape[0]
        param.data.copy_(loaded_weight.narrow(0, layer.tp_rank * rows, rows))

    return load_rows
