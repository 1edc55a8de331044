"""Export of int8 weights to ONNX::

    import int8fx.integrations.onnx

    copy = int8fx.integrations.onnx.exportable(int8fx.quantize_(model))
    torch.onnx.export(copy, (x,), "model.onnx", dynamo=True)

ONNX has no operators of int8fx. In the copy each int8 weight is ``DequantizeLinear`` of its integers
and scales, in front of the product:

    y = x @ (w_int8 · w_scale)ᵀ + bias        w_int8 [N, K] int8, w_scale [N] fp32

The file holds the integers, and every runtime knows the operator. Activations stay in float, so the
copy computes what the scheme ``w8a16`` does, whatever the weight's own scheme.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8fx.arguments import check_module
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.weights.tensor import QuantizedWeight

OPERATOR = "DequantizeLinear"
ROWS = 0  # the axis that has a scale each


class DequantizedLinear(nn.Module):
    """A linear whose weight is int8 with a scale per channel, and is de-quantised for each call.

    Attributes:
        w_int8: ``[N, K]`` int8.
        w_scale: ``[N]`` fp32.
        bias: ``[N]`` or None.
    """

    w_int8: Tensor
    w_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        w_int8, w_scale = weight.stored()[:2]
        self.register_buffer("w_int8", w_int8)
        self.register_buffer("w_scale", w_scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight().to(x.dtype), self.bias)

    def _weight(self) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self.w_int8 * self.w_scale.unsqueeze(1)
        return torch.onnx.ops.symbolic(
            OPERATOR,
            (self.w_int8, self.w_scale),
            {"axis": ROWS},
            dtype=self.w_scale.dtype,
            shape=self.w_int8.shape,
        )


def exportable(model: nn.Module) -> nn.Module:
    """A copy of a quantised model that ``torch.onnx.export(dynamo=True)`` writes with int8 weights.

    Raises:
        TypeError: names what was given in the place of a module.
        ValueError: no weight is quantised, or one has another format than int8 per channel: names it.

    Examples:
        >>> import int8fx, torch
        >>> from int8fx.integrations.onnx import exportable
        >>> model = int8fx.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> copied = exportable(model)
        >>> copied[0].w_int8.dtype
        torch.int8
    """
    check_module(model, "exportable")
    replaced = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight):
            _check(path, weight)
            replaced[path] = DequantizedLinear(weight, getattr(module, "bias", None))
    if not replaced:
        raise ValueError(
            f"exportable: no weight of {type(model).__name__} is quantised; call int8fx.quantize_ first"
        )
    if "" in replaced:
        return replaced[""].train(model.training)
    # What is replaced need not be copied.
    memo = {id(model.get_submodule(path)): made for path, made in replaced.items()}
    return copy.deepcopy(model, memo)


def _check(path: str, weight: QuantizedWeight) -> None:
    if weight.weight_format.files != PER_CHANNEL.name or weight.weight_format.name != PER_CHANNEL.name:
        raise ValueError(
            f"exportable: {path} is {weight.weight_format.name}, of the scheme "
            f"{weight.choice.scheme.name!r}; allowed: schemes whose weights are int8 with a scale per "
            "channel, as llm.int8, absmax-vector and w8a16"
        )
