"""Linears of weights by groups in float64, and by how much a kernel may be off them.

The bound is that of ``kernels/ops/grouped_linear.py``, for every scheme whose weights are by groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from int8fx.kernels.formats.codes import unpack_bits
from int8fx.kernels.formats.grouped import WHOLE
from int8fx.kernels.ops import grouped_linear as ops
from int8fx.kernels.schemes.scheme import Choice
from int8fx.testing.bounds import FP32


def expected_and_bound(
    choice: Choice, x: Tensor, stored: Sequence[Tensor], bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The formula of a scheme in float64, ``[M, N]``, and the bound of a kernel.

    Args:
        stored: the parts of a weight, as its format stores them.
    """
    if choice.scheme.name == "w8a16-group":
        w_int8, scale = stored
        nothing = torch.empty(len(scale), 0)
        return sums_and_bound(x, x[:, :0], w_int8, scale, 0 * scale, nothing, bias, x.dtype)
    settings, (packed, scale, *others) = choice.settings, stored
    zero = None if settings.zeros == "middle" else others.pop(0)
    if settings.act_order:
        x = x[:, others.pop(0).long()]
    x_hat, x_columns = x, x[:, :0]
    if choice.scheme.name == "w4a8-group":
        at = torch.tensor(settings.columns, dtype=torch.int32)
        how = 0.0, settings.block, settings.rotation
        x_int8, x_scale, _, x_columns = ops.quantize_rotated_reference(x, at, *how)
        x_hat = x_int8.double() * x_scale.double().unsqueeze(-1)
    w_columns = others[0] if others else torch.empty(len(scale), 0)
    columns = x_hat.shape[1] if settings.group_size == WHOLE else scale.shape[1] * settings.group_size
    codes, offset = unpack_bits(packed, 4)[:, :columns], offsets(scale, zero, settings.zeros)
    return sums_and_bound(x_hat, x_columns, codes, scale, offset, w_columns, bias, x.dtype)


def offsets(scale: Tensor, zero: Tensor | None, zeros: str) -> Tensor:
    """What x's sum in a group is multiplied by, ``[N, G]`` float64."""
    if zero is not None and zeros == "offset":
        return zero.double()
    return -scale.double() * (8 if zero is None else zero.double())


def sums_and_bound(
    x_hat: Tensor,
    x_columns: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    w_columns: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Σ_g [(x̂_g @ code_gᵀ) · scale + Σ x̂_g · offset] + x_columns @ w_columnsᵀ + bias, and the bound.

    Args:
        x_hat: ``[M, K]``, in float64 where it stands for integers, whose sums are exact.
        codes: ``[N, G · width]``; scale and offset: ``[N, G]``; w_columns: ``[N, C]``.
        dtype: of the result.
    """
    G = scale.shape[1]
    width = codes.shape[1] // G
    groups = F.pad(x_hat, (0, G * width - x_hat.shape[1])).unflatten(1, (G, -1))
    parts = groups, codes.unflatten(1, (G, -1)), scale, offset, x_columns, w_columns
    operands = [each.double() for each in parts]

    def total(groups, codes, scale, offset, x_columns, w_columns):
        products = torch.einsum("mgk,ngk,ng->mn", groups, codes, scale)
        return products + groups.sum(-1) @ offset.t() + x_columns @ w_columns.t()

    expected, magnitude = total(*operands), total(*(each.abs() for each in operands))
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    # Two fused products a group and a column; sums of rows in float are in fp32 themselves.
    roundings = 2 * (G + w_columns.shape[1]) + 8
    roundings += 0 if x_hat.dtype == torch.float64 else width
    info = torch.finfo(dtype)
    bound = FP32 * roundings * magnitude
    return expected, bound + info.eps * (expected.abs() + bound) + info.smallest_normal
