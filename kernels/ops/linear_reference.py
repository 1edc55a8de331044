"""The int8 linear: exact integer product, 16-bit outlier product, de-quantise and bias.

    y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias

The outlier product uses the weight's int8 form, so no 16-bit copy of the weight is kept.
Source: Dettmers et al. 2022, "LLM.int8()", equation 8.
"""

from torch import Tensor


def linear_reference(
    x_int8: Tensor,
    x_scale: Tensor,
    x_outlier: Tensor,
    outlier_columns: Tensor | None,
    w_int8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The formula above in plain PyTorch: the oracle, and what runs where nothing faster exists.

    Args:
        x_int8: ``[*, K]`` int8.
        x_scale: ``[*]`` fp32.
        x_outlier: ``[*, K]``; its dtype is the output's.
        outlier_columns: ``[K]`` bool, or None: no outliers, and ``x_outlier`` gives the dtype only.
        w_int8: ``[N, K]`` int8.
        w_scale: ``[N]`` fp32.
        bias: ``[N]`` or None.

    Returns:
        ``[*, N]`` in x_outlier's dtype. Sums are fp32 after an exact integer product.
    """
    K = x_int8.shape[-1]
    # float64 holds every int32 exactly, and unlike an int32 matmul it has a fast kernel.
    acc_int32 = x_int8.reshape(-1, K).double() @ w_int8.double().t()
    y = acc_int32.float() * x_scale.reshape(-1, 1)
    if outlier_columns is not None:
        y = y + x_outlier.reshape(-1, K).float() @ w_int8.float().t()
    y = y * w_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x_outlier.dtype).reshape(*x_int8.shape[:-1], w_int8.shape[0])
