"""Linears on a GPU that have no kernel of their own, composed of operators that Inductor has.

``int8_linear`` for rows that come quantised:

llm.int8 quantises inside its own kernels (``linear.py``). Schemes whose rows are quantised otherwise
(``kernels/schemes/affine.py``) meet the weight here: the integer product is ``_int_mm``, for which
Inductor has a Triton template beside cuBLAS, or up to 16 rows a sum that it turns into one kernel; the
outlier product is a 16-bit one with the weight de-quantised before it.

``codebook_linear`` and its gradient: Inductor fuses what de-quantises the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.gpu.packing import padded_rows
from int8fx.kernels.ops.codebook_linear import decoded

# What the integer product of cuBLAS wants of its sizes.
_MORE_ROWS_THAN, _MULTIPLE = 16, 8


def int8_linear(
    x_int8: Tensor,
    x_scale: Tensor,
    x_outlier: Tensor,
    outlier_columns: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Any:
    """The formula of ``kernels/ops/linear_reference.py``; NotImplemented for what is not on a GPU.

    Args:
        weight: ``[N, K]`` int8 as ``packing.pack`` leaves it; the others as there.
    """
    if x_int8.device.type != "cuda":
        return NotImplemented
    K = weight.shape[1]  # of the packed weight
    acc_int32 = _product(padded_rows(x_int8).reshape(-1, K), weight)
    y = acc_int32.to(torch.float32) * x_scale.reshape(-1, 1)
    if outlier_columns is not None:
        outliers = padded_rows(x_outlier).reshape(-1, K)
        y = y + F.linear(outliers, weight.to(outliers.dtype)).to(torch.float32)
    y = y * w_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x_outlier.dtype).reshape(*x_int8.shape[:-1], weight.shape[0])


def codebook_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, values: Tensor, block: int, bias: Tensor | None
) -> Any:
    """The formula of ``kernels/ops/codebook_linear.py``; NotImplemented for what is not on a GPU."""
    if x.device.type != "cuda":
        return NotImplemented
    w_hat = decoded(packed, absmax, values, block, x.shape[-1]).to(x.dtype)
    return F.linear(x, w_hat, None if bias is None else bias.to(x.dtype))


def codebook_linear_backward(
    grad: Tensor, packed: Tensor, absmax: Tensor, values: Tensor, block: int, K: int
) -> Any:
    if grad.device.type != "cuda":
        return NotImplemented
    return grad @ decoded(packed, absmax, values, block, K).to(grad.dtype)


def _product(x_int8: Tensor, weight: Tensor) -> Tensor:
    """``[M, K] @ [N, K]ᵀ`` in int32, exact."""
    M, N = x_int8.shape[0], weight.shape[0]
    if M <= _MORE_ROWS_THAN:
        return (x_int8.unsqueeze(1).to(torch.int32) * weight.to(torch.int32)).sum(-1, dtype=torch.int32)
    columns = -x_int8.shape[1] % _MULTIPLE
    x_int8 = F.pad(x_int8, (0, columns))
    weight = F.pad(weight, (0, columns, 0, -N % _MULTIPLE))
    return torch._int_mm(x_int8, weight.t())[:, :N]
