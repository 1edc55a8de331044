"""A norm and the linears that read it, as one operator that Inductor sees into.

    h   = norm(x)                      or of x + addend, which is a result as well
    y_i = int8_linear(quantize(h, threshold, decomposition), weights[i], w_scales[i], biases[i])

As ``linear.py``'s, but for 17 rows and more h is nowhere in memory (``norm.py``): the first of three
launches is a kernel of ours. With fewer rows it is Inductor that computes and quantises h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from int8fx.kernels.gpu import decode
from int8fx.kernels.gpu.columns import row_index_dtype
from int8fx.kernels.gpu.launch import empty, run
from int8fx.kernels.gpu.linear import Linears, Source, check, product, quantized
from int8fx.kernels.gpu.norm import (
    NORMS,
    norm_kernel,
    norm_shape,
    norm_statistics,
    normalized_reference,
    serves,
)
from int8fx.kernels.gpu.packing import padded_rows


@triton_op("int8fx::normed_linears_gpu", mutates_args=())
def normed_linears(
    x: Tensor,
    addend: Tensor | None,
    norm: str,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    threshold: float,
    decomposition: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    sums: bool = True,
) -> list[Tensor]:
    """One to three int8 linears of one norm, on a GPU; no gradients.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        addend: the same; what is normalised is then ``x + addend``.
        norm: one of ``norm.NORMS``.
        norm_weight: ``[K]``.
        norm_bias: ``[K]``, where the norm has one.
        eps: is added to the mean square.
        threshold: an element of h is an outlier when ``|h| >= threshold``; not 0.
        decomposition: ``"column"`` or ``"token"``.
        weights, w_scales, biases, sums: as ``int8_linears_gpu`` takes them.

    Returns:
        each ``[*, N_i]``, of h's dtype; with an addend ``x + addend`` after them.

    Raises:
        ValueError: a norm or a decomposition of another name, or a threshold of 0; and what
            ``int8_linears_gpu`` raises.
    """
    if norm not in NORMS or decomposition not in ("column", "token") or threshold == 0:
        raise ValueError(
            f"norm {norm!r}, decomposition {decomposition!r} and threshold {threshold}; allowed: "
            f"{', '.join(map(repr, NORMS))}; 'column' or 'token'; and not 0"
        )
    check(x, weights, biases)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    addends = addend.reshape(rows.shape).contiguous() if addend is not None else None
    linears = Linears(list(weights), list(w_scales), list(biases))
    aligned = weights[0].shape[1] == rows.shape[1]  # else h is given zeros at the end of its rows
    if rows.shape[0] > decode.MAX_M and serves(rows) and aligned:
        source, total = _normed_source(
            rows, addends, norm, norm_weight, norm_bias, eps, threshold, decomposition
        )
        outputs = product(source, threshold, linears)
    else:
        total = rows if addends is None else rows + addends
        h = normalized_reference(
            total, *norm_statistics(total, norm, eps), norm_weight, norm_bias, norm
        )
        outputs = quantized(padded_rows(h), threshold, decomposition, linears, sums)
    results = outputs if addend is None else [*outputs, total]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in results]


def _normed_source(
    x: Tensor,
    addend: Tensor | None,
    norm: str,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    threshold: float,
    decomposition: str,
) -> tuple[Source, Tensor]:
    """What is gathered from; and what is normalised."""
    M, K = x.shape
    total = x if addend is None else torch.empty_like(x)
    statistics, x_scale = empty(x, (2, M), torch.float32), empty(x, (M,), torch.float32)
    candidates = empty(x, (K,), row_index_dtype(M))
    x_int8 = empty(x, (M, K), torch.int8)
    quantizes = decomposition == "token"
    run(
        norm_kernel,
        (M,),
        x,
        addend,
        total if addend is not None else None,
        weight,
        bias,
        statistics,
        candidates,
        x_int8 if quantizes else None,
        x_scale if quantizes else None,
        M,
        K,
        eps,
        threshold,
        NORM=norm,
        ADDS=addend is not None,
        QUANTIZE=quantizes,
        **norm_shape(x),
    )
    dtype = weight.dtype if norm == "rms, rounded" else x.dtype
    operands = (statistics, weight, bias)
    return Source(total, dtype, candidates, x_int8, x_scale, quantizes, norm, operands), total
