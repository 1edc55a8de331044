"""A weight that the files hold quantised: vLLM's parameters for its tensors, and the weight of them.

Each tensor has the rows of the weight first, so vLLM cuts and merges them as it does a float weight.
``weight_scheme`` has none: matrices that vLLM keeps as one must agree on it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from int8fx.errors import CheckpointError
from int8fx.integrations.vllm.files import SCHEME, WEIGHT, StoredWeight
from int8fx.kernels.schemes.scheme import Choice
from int8fx.weights import state_dict
from int8fx.weights.tensor import QuantizedWeight

Loader = Callable[..., None]
LIKE = "int8fx_like"  # the attribute of a layer that stands for the weight meanwhile


def create(layer: Any, like: QuantizedWeight, stored: StoredWeight, loader: Loader) -> None:
    """Registers a parameter for each tensor of a weight.

    Args:
        like: the weight on the meta device.
        loader: vLLM's, or what takes its place, for all that has rows.
    """
    setattr(layer, LIKE, like)
    N, K = like.shape
    dtypes = _dtypes(like, stored)
    for name, behind in stored.sizes.items():
        if name == SCHEME:
            layer.register_parameter(name, _scheme(layer))
            continue
        # K may be cut, of a plain matrix.
        sizes = (N, K) if stored.is_plain and name == WEIGHT else (N, *behind)
        data = torch.empty(sizes, dtype=dtypes[name])
        given = {"data": data, "output_dim": 0, "weight_loader": _matrix(loader)}
        parameter = (
            ModelWeightParameter(input_dim=1, **given)
            if len(sizes) == 2
            else ChannelQuantScaleParameter(**given)
        )
        layer.register_parameter(name, parameter)


def on_meta(N: int, K: int, choice: Choice, dtype: torch.dtype) -> QuantizedWeight:
    """What stands for a weight ``[N, K]`` of activations of ``dtype``."""
    empty = torch.empty(N, K, dtype=dtype, device="meta")
    return QuantizedWeight.quantized(empty, choice, transposed=False)


def _dtypes(like: QuantizedWeight, stored: StoredWeight) -> dict[str, torch.dtype]:
    """Of each tensor. A part that is no number of bits has that of the float weight."""
    if stored.is_plain:
        return {name: torch.int8 if name == WEIGHT else torch.float32 for name in stored.sizes}
    weight_format = like.weight_format
    names = state_dict.part_names(WEIGHT, weight_format)
    return {
        name: part.dtype or like.dtype for name, part in zip(names, weight_format.parts, strict=True)
    }


def _matrix(loader: Loader) -> Loader:
    """int8fx writes matrices as ``[1, N, K]`` (``int8fx/weights/state_dict.py``)."""

    @functools.wraps(loader)
    def load_matrix(param: Tensor, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        if loaded_weight.dim() == 3:
            loaded_weight = loaded_weight.squeeze(0)
        loader(param, loaded_weight, *args, **kwargs)

    return load_matrix


def _scheme(layer: Any) -> nn.Parameter:
    """The parameter of ``weight_scheme``, which each of the matrices of a layer brings."""

    def load(param: Tensor, loaded_weight: Tensor, *shard: Any) -> None:
        if param.numel() and not torch.equal(param.data, loaded_weight):
            said = " and ".join(bytes(each.tolist()).decode() for each in (param, loaded_weight))
            raise CheckpointError(
                f"{layer.prefix}: vLLM keeps several matrices of the files as one, and they differ in "
                f"their schemes or columns: {said}"
            )
        param.data = loaded_weight.clone()

    parameter = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


def take(layer: Any) -> QuantizedWeight:
    """The weight that was loaded; the parameters of its tensors are gone from the layer.

    Raises:
        CheckpointError: what was loaded is damaged, or of another scheme; names the tensor.
    """
    like: QuantizedWeight = getattr(layer, LIKE)
    names = [name for name in layer._parameters if name in state_dict.keys_of(WEIGHT, like)]
    state = {name: getattr(layer, name).data for name in names}
    for name in (*names, LIKE):
        delattr(layer, name)
    try:
        weight = state_dict.read(WEIGHT, like, state)
    except CheckpointError as error:
        raise CheckpointError(f"{layer.prefix}.{error}") from error
    assert weight is not None
    return weight
