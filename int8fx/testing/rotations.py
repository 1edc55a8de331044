"""Oracles of the rotated int8 linear: the matrix by its definition, and the error bound."""

import functools

import torch
from torch import Tensor

from int8fx.kernels.formats.rotated import rotated
from int8fx.kernels.ops.rotated_linear import quantize_rotated_reference
from int8fx.kernels.ops.rotation import block_of, is_negative, rotated_columns
from int8fx.testing.bounds import FP32, HALF


def matrix(K: int, block: int, rotation: str) -> Tensor:
    """``[K, rotated_columns(K)]`` float64: ``rotate(x) = x @ matrix``, element by element."""
    size = block_of(K, block, rotation)
    blocks = rotated_columns(K, block, rotation) // size
    return torch.block_diag(*[_block(size, rotation)] * blocks)[:K]


@functools.cache
def _block(size: int, rotation: str) -> Tensor:
    ones = [
        [(i & j).bit_count() % 2 == is_negative(j, rotation) for i in range(size)] for j in range(size)
    ]
    return torch.where(torch.tensor(ones), 1.0, -1.0).double() * 2.0 ** -((size.bit_length() - 1) // 2)


def rotation_error(x: Tensor, block: int, rotation: str) -> Tensor:
    """``[*, rotated_columns(K)]``: by how much ``rotate(x)`` in fp32 may differ from the exact one.

    Each of the log2(block) additions rounds a sum of at most the block's magnitudes. 2**-149 is the
    step of what underflows.
    """
    size = block_of(x.shape[-1], block, rotation)
    magnitudes = x.double().abs() @ matrix(x.shape[-1], block, rotation).abs()
    rounded = (1 + FP32) ** (size.bit_length() - 1) - 1
    return rounded * magnitudes + size * 2.0**-149


def expected_and_bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: tuple[int, ...],
    block: int,
    rotation: str,
) -> tuple[Tensor, Tensor]:
    """The float64 result ``[*, N]``, and by how much int8-rotated in x's dtype may differ from it.

    With r and v the exact rotated rows of x and of the weight, r̂ = x_int8 · x_scale and
    v̂ = w_int8 · w_scale:

        |Σ r̂ v̂ - Σ r v|  <=  Σ |r̂ - r| |v̂| + |r| |v̂ - v|
        |r̂ - r|  <=  x_scale / 2 + what the butterflies round,      |v̂ - v| the same

    The integer sum is rounded once, and meets two scales; each column is a product and a sum.
    """
    weight_format = rotated(block, rotation, columns)
    _, w_scale, w_columns = weight_format.quantize(weight)
    at = torch.tensor(columns, dtype=torch.int32)
    x_int8, x_scale, *_ = quantize_rotated_reference(x, at, 0.0, block, rotation)
    rest = [tensor.double().index_fill(-1, at.long(), 0) for tensor in (x, weight)]
    H = matrix(x.shape[-1], block, rotation)
    other = 2.0 ** -((block_of(x.shape[-1], block, rotation).bit_length() - 1) % 2)  # of the weight
    r, v = rest[0] @ H, rest[1] @ H * other
    off_x = x_scale.double().unsqueeze(-1) * HALF + rotation_error(rest[0], block, rotation)
    off_w = w_scale.double().unsqueeze(-1) * HALF + rotation_error(rest[1], block, rotation)
    v_hat = v.abs() + off_w
    quantizing = off_x @ v_hat.t() + r.abs() @ off_w.t()

    expected = x.double() @ weight.double().t()
    of_columns = x.double()[..., at.long()].abs() @ w_columns.double().abs().t()
    magnitude = (x_int8.double().abs() * x_scale.double().unsqueeze(-1)) @ v_hat.t() + of_columns
    if bias is not None:
        expected = expected + bias.double()
        magnitude = magnitude + bias.double().abs()
    arithmetic = FP32 * (2 * len(columns) + 8) * magnitude
    info = torch.finfo(x.dtype)
    rounding = info.eps * (expected.abs() + quantizing + arithmetic) + info.smallest_normal
    return expected, quantizing + arithmetic + rounding
