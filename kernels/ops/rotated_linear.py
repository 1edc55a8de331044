"""The rotated int8 linear: block Hadamard rotation, per-token int8, and a few columns in 16-bit.

    y = (x_int8 @ w_int8ᵀ) · x_scale · w_scale + x[:, columns] @ w_columns + bias

With the rotation ``"none"`` it is LLM.int8() of x without the columns, its outliers taken out token by
token (the decomposition ``"static"``): x_outlier @ w_int8ᵀ · w_scale comes to the sum.

    rest     x, 0 at ``columns``
    x_int8   round(rotate(rest) / x_scale),  x_scale = max |rotate(rest)| of the row / 127
    w_int8   the same of the weight, which is rotated when it is packed (``kernels/formats/rotated.py``)

``columns`` are fixed, not found in x, so a row of y depends on that row of x alone: its integers are
exact, and the columns' products are added in ascending order in fp32. The rotation is
``kernels/ops/rotation.py``'s.

| operator | |
|---|---|
| ``rotated_linear`` | one linear |
| ``rotated_linears`` | several linears of one x; those with the same columns share its rotation |
| ``rotated_expert_linear`` | each row with the matrix of its expert (``expert_linear.py``) |

**Gradients** are straight-through: that of x is ``grad @ ŵ`` with ŵ as ``dequantize_rotated`` has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8fx.kernels import table
from int8fx.kernels.ops.expert_linear import routed_rows
from int8fx.kernels.ops.gradients import bias_gradient
from int8fx.kernels.ops.library import register
from int8fx.kernels.ops.quantize_reference import quantize_reference
from int8fx.kernels.ops.rotation import (
    NONE,
    ROTATIONS,
    allowed_blocks,
    rotate,
    rotate_back,
    rotated_columns,
)


def check_rotation(threshold: float, block: int, rotation: str) -> None:
    """Raises:
    ValueError: there is no such rotation or block, or a threshold where rows are rotated.
    """
    if rotation not in (*ROTATIONS, NONE):
        raise ValueError(f"rotation is {rotation!r}; allowed: {', '.join((*ROTATIONS, NONE))}")
    if rotation != NONE and (block not in allowed_blocks(rotation) or threshold != 0):
        sizes = ", ".join(map(str, allowed_blocks(rotation)))
        raise ValueError(f"block is {block} and threshold {threshold}; allowed: {sizes}, and 0")


# --- the reference --------------------------------------------------------------------------------


def quantize_rotated_reference(
    x: Tensor, columns: Tensor, threshold: float, block: int, rotation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Int8 of the rotated ``x`` without some columns, in plain PyTorch.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        columns: ``[C]`` int32, ascending.
        threshold: of outliers in what is left, see ``quantize_reference.py``; 0 where it is rotated.
        block, rotation: see ``kernels/ops/rotation.py``.

    Returns:
        ``x_int8 [*, rotated_columns(K)]`` int8, ``x_scale [*]`` fp32, ``x_outlier [*, K]`` of x's
        dtype, empty with threshold 0, and ``x[..., columns] [*, C]``.
    """
    at = columns.long()
    rest = (
        rotate(x.index_fill(-1, at, 0), block, rotation)
        if rotation != NONE
        else x.index_fill(-1, at, 0)
    )
    x_int8, x_scale, x_outlier, _ = quantize_reference(rest, threshold, "token")
    return x_int8, x_scale, x_outlier.to(x.dtype), x.index_select(-1, at)


def rotated_linear_reference(
    x_int8: Tensor,
    x_scale: Tensor,
    x_outlier: Tensor,
    x_columns: Tensor,
    w_int8: Tensor,
    w_scale: Tensor,
    w_columns: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The formula above of rows that are quantised: ``[*, N]`` of x_columns' dtype.

    Args:
        w_int8: ``[N, rotated_columns(K)]`` int8; w_scale: ``[N]`` fp32; w_columns: ``[C, N]``.
    """
    acc_int32 = x_int8.reshape(-1, x_int8.shape[-1]).double() @ w_int8.double().t()
    y = acc_int32.float() * x_scale.reshape(-1, 1)
    if x_outlier.numel():
        y = y + x_outlier.reshape(-1, x_outlier.shape[-1]).float() @ w_int8.float().t()
    y = y * w_scale
    of_columns = torch.zeros_like(y)
    for index, row in enumerate(w_columns.float()):
        # One column after another: the order of a library's sum depends on the number of rows.
        of_columns = of_columns + x_columns.reshape(-1, len(w_columns))[:, index, None].float() * row
    y = y + of_columns
    if bias is not None:
        y = y + bias.float()
    return y.to(x_columns.dtype).reshape(*x_int8.shape[:-1], w_int8.shape[0])


def dequantize_rotated(
    w_int8: Tensor,
    w_scale: Tensor,
    w_columns: Tensor,
    columns: Tensor,
    K: int,
    block: int,
    rotation: str,
) -> Tensor:
    """ŵ ``[N, K]`` of w_scale's dtype: rotated back, and ``w_columns`` in their places."""
    steps = w_int8.to(w_scale.dtype)
    if rotation != NONE:
        steps = rotate_back(steps, K, block, rotation)
    # The largest float's rounding may be above it.
    largest = torch.finfo(w_scale.dtype).max
    w_hat = (steps * w_scale.unsqueeze(1)).clamp(-largest, largest)
    return w_hat.index_copy(1, columns.long(), w_columns.t().to(w_scale.dtype))


# --- rotated_linear, rotated_linears --------------------------------------------------------------


def _rotated_linears(
    x: Tensor,
    threshold: float,
    block: int,
    rotation: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    w_columns: Sequence[Tensor],
    columns: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    check_rotation(threshold, block, rotation)
    K = rotated_columns(x.shape[-1], block, rotation)
    all_biases: Sequence[Tensor | None] = biases or [None] * len(weights)
    outputs = []
    for weight, w_scale, w_in_float, at, bias in zip(
        weights, w_scales, w_columns, columns, all_biases, strict=True
    ):
        quantized = quantize_rotated_reference(x, at, threshold, block, rotation)
        w_int8 = table.unpack(weight, w_scale.shape[0], K)
        outputs.append(rotated_linear_reference(*quantized, w_int8, w_scale, w_in_float, bias))
    return outputs


def _rotated_linear(x, threshold, block, rotation, weight, w_scale, w_columns, columns, bias) -> Tensor:
    biases = [] if bias is None else [bias]
    parts = [weight], [w_scale], [w_columns], [columns]
    return _rotated_linears(x, threshold, block, rotation, *parts, biases)[0]


def _output(x: Tensor, w_scale: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], w_scale.shape[-1]), dtype=x.dtype, device=x.device)


def _fake(x, threshold, block, rotation, weight, w_scale, w_columns, columns, bias) -> Tensor:
    return _output(x, w_scale)


def _fakes(
    x, threshold, block, rotation, weights, w_scales, w_columns, columns, biases
) -> list[Tensor]:
    return [_output(x, w_scale) for w_scale in w_scales]


def _input_gradient(grad: Tensor, parts: Sequence[Tensor], K: int, block: int, rotation: str) -> Tensor:
    weight, w_scale, w_columns, columns = parts
    rotated = rotated_columns(K, block, rotation)
    w_int8 = torch.ops.int8fx.unpack_weight(weight, w_scale.shape[0], rotated)
    w_hat = dequantize_rotated(w_int8, w_scale, w_columns, columns, K, block, rotation)
    return grad @ w_hat.to(grad.dtype)


def _setup(ctx, inputs, output) -> None:
    x, _, ctx.block, ctx.rotation, *parts, bias = inputs
    ctx.save_for_backward(*parts)
    ctx.K, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple:
    grad_x = _input_gradient(grad, ctx.saved_tensors, ctx.K, ctx.block, ctx.rotation)
    grad_bias = None if ctx.bias_dtype is None else bias_gradient(grad, ctx.bias_dtype)
    return grad_x, *[None] * 7, grad_bias


def rotated_linears_setup(ctx, inputs, output) -> None:
    x, _, ctx.block, ctx.rotation, *parts, biases = inputs
    ctx.save_for_backward(*(tensor for part in parts for tensor in part))
    ctx.K, ctx.bias_dtypes = x.shape[-1], [bias.dtype for bias in biases]


def rotated_linears_backward(ctx, grads: Sequence[Tensor]) -> tuple:
    saved, count = ctx.saved_tensors, len(grads)
    parts = [saved[start : start + count] for start in range(0, len(saved), count)]
    grad_x = sum(
        _input_gradient(grad, each, ctx.K, ctx.block, ctx.rotation)
        for grad, each in zip(grads, zip(*parts, strict=True), strict=True)
    )
    pairs = zip(grads, ctx.bias_dtypes, strict=False)
    grad_biases = [bias_gradient(grad, dtype) for grad, dtype in pairs]
    return grad_x, None, None, None, *([None] * count for _ in parts), grad_biases


rotated_linear = register(
    "rotated_linear(Tensor x, float threshold, int block, str rotation, Tensor weight, Tensor w_scale, "
    "Tensor w_columns, Tensor columns, Tensor? bias) -> Tensor",
    _rotated_linear,
    _fake,
    _setup,
    _backward,
)
rotated_linears = register(
    "rotated_linears(Tensor x, float threshold, int block, str rotation, Tensor[] weights, "
    "Tensor[] w_scales, Tensor[] w_columns, Tensor[] columns, Tensor[] biases) -> Tensor[]",
    _rotated_linears,
    _fakes,
    rotated_linears_setup,
    rotated_linears_backward,
)


# --- rotated_expert_linear ------------------------------------------------------------------------


def _rotated_expert_linear(
    x: Tensor,
    threshold: float,
    block: int,
    rotation: str,
    weight: Tensor,
    w_scale: Tensor,
    w_columns: Tensor,
    columns: Tensor,
    experts: Tensor | None,
    ends: Tensor | None = None,
) -> Tensor:
    """Each row with the matrix of its expert; a row without one is zero.

    Args:
        x: ``[S, K]``, fp32, bf16 or fp16.
        weight, w_scale, w_columns: those of ``rotated_linear``, stacked along a first dimension E.
        columns: ``[C]``, the same for all experts.
        experts, ends: see ``expert_linear.py``.
    """
    y = x.new_zeros((x.shape[0], w_scale.shape[1]))
    for e, rows in routed_rows(experts, ends, weight.shape[0]):
        parts = weight[e], w_scale[e], w_columns[e], columns
        y[rows] = rotated_linear(x[rows], threshold, block, rotation, *parts, None)
    return y


def _experts_fake(
    x, threshold, block, rotation, weight, w_scale, w_columns, columns, experts, ends=None
):
    return x.new_empty((x.shape[0], w_scale.shape[1]))


def _experts_setup(ctx, inputs, output) -> None:
    x, _, ctx.block, ctx.rotation, *tensors = inputs
    # An argument at its default is not among the inputs.
    ctx.save_for_backward(*tensors, *[None] * (6 - len(tensors)))
    ctx.K, ctx.inputs = x.shape[-1], len(inputs)


def _experts_backward(ctx, grad: Tensor) -> tuple:
    grad_x = rotated_expert_linear_backward(grad, ctx.block, ctx.rotation, *ctx.saved_tensors, ctx.K)
    return (grad_x, *[None] * (ctx.inputs - 1))


def _experts_input_gradient(
    grad, block, rotation, weight, w_scale, w_columns, columns, experts, ends, K
) -> Tensor:
    grad_x = grad.new_zeros((grad.shape[0], K))
    for e, rows in routed_rows(experts, ends, weight.shape[0]):
        parts = weight[e], w_scale[e], w_columns[e], columns
        grad_x[rows] = _input_gradient(grad[rows], parts, K, block, rotation)
    return grad_x


def _experts_input_gradient_fake(
    grad, block, rotation, weight, w_scale, w_columns, columns, experts, ends, K
) -> Tensor:
    return grad.new_empty((grad.shape[0], K))


rotated_expert_linear_backward = register(
    "rotated_expert_linear_backward(Tensor grad, int block, str rotation, Tensor weight, "
    "Tensor w_scale, Tensor w_columns, Tensor columns, Tensor? experts, Tensor? ends, SymInt K) "
    "-> Tensor",
    _experts_input_gradient,
    _experts_input_gradient_fake,
)
rotated_expert_linear = register(
    "rotated_expert_linear(Tensor x, float threshold, int block, str rotation, Tensor weight, "
    "Tensor w_scale, Tensor w_columns, Tensor columns, Tensor? experts, Tensor? ends=None) -> Tensor",
    _rotated_expert_linear,
    _experts_fake,
    _experts_setup,
    _experts_backward,
)
