"""Quantisation and the linears that read it, as one operator that Inductor sees into.

    y_i = int8_linear(quantize(x, threshold, decomposition), weights[i], w_scales[i], biases[i])

It is a ``triton_op``: under torch.compile its body becomes part of the graph. Its aten part is fused
with whatever computes ``x`` and what reads ``y``, and the launches of our kernels are lines of
Inductor's wrapper. Everything after ``x``, in launches:

| M | decomposition | fused with x's own kernel | ours |
|---|---|---|---|
| 1 | any | quantise | decode |
| 2-16 | column | | decode, which quantises |
| 2-16 | token, none | quantise | decode |
| 17 up | column | witness | quantise and gather, product |
| 17 up | token | quantise, witness | gather, product |
| 17 up | none (threshold 0) | quantise | product |

Shapes depend on shapes alone, and the number of outliers stays on the device, so a captured CUDA graph
replays for any input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.columns import witness_rows
from int8fx.kernels.gpu.decode import MAX_M, decode_kernel, sum_of_parts
from int8fx.kernels.gpu.gather import BLOCK_O, launch_shape, quantize_gather_kernel
from int8fx.kernels.gpu.gemm import gemm_kernel
from int8fx.kernels.gpu.groups import MAX_GROUP, padded
from int8fx.kernels.quantize import quantize_reference

_GROUP_M = 8  # tiles of rows that share the weight's tiles in L2


@triton_op("int8fx::quantized_linears", mutates_args=())
def quantized_linears(
    x: Tensor,
    threshold: float,
    decomposition: str,
    weights: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """One to three int8 linears of one activation, on a GPU.

    Args:
        x: ``[*, K]``, fp32, bf16 or fp16.
        threshold: an element is an outlier when ``|x| >= threshold``; 0 means no decomposition.
        decomposition: ``"column"`` or ``"token"``.
        weights: each ``[N_i, K]`` int8, contiguous.
        w_scales: each ``[N_i]`` fp32.
        biases: each ``[N_i]``, all of one dtype; or empty, no linear has one.

    Returns:
        each ``[*, N_i]``, of x's dtype.

    Raises:
        ValueError: more linears than a group takes, or only some with a bias.
    """
    if not 1 <= len(weights) <= MAX_GROUP or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"1 to {MAX_GROUP} linears, all with a bias or none; given {len(weights)} weights "
            f"and {len(biases)} biases"
        )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    linears = _Linears(list(weights), list(w_scales), list(biases))
    if rows.shape[0] <= MAX_M:
        outputs = _decode(rows, threshold, decomposition, linears)
    else:
        outputs = _product(rows, threshold, decomposition, linears)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


class _Linears:
    """The operands of a group, and what its kernels are told about them."""

    def __init__(self, weights: list[Tensor], w_scales: list[Tensor], biases: list[Tensor]) -> None:
        self.weights, self.w_scales, self.biases = weights, w_scales, biases
        self.widths = [weight.shape[0] for weight in weights]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        # Without biases the scales stand in: a kernel with HAS_BIAS = False reads no bias.
        biases = self.biases or self.w_scales
        return (*padded(self.weights), *padded(self.w_scales), *padded(biases))

    @property
    def N(self) -> tuple[int, int, int]:
        return padded(self.widths, absent=0)

    @property
    def flags(self) -> dict[str, bool]:
        return {"GROUPED": len(self.weights) > 1, "HAS_BIAS": bool(self.biases)}

    def outputs(self, x: Tensor, *shape: Any, dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty((*shape, N), dtype=dtype, device=x.device) for N in self.widths]


def _output_pointers(outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Three pointers for one to three outputs.

    Not one tensor twice: functionalisation would take the two for different results of the kernel.
    """
    fill = [outputs[0].new_empty(1) for _ in range(MAX_GROUP - len(outputs))]
    first, second, third = (*outputs, *fill)
    return first, second, third


def _decode(x: Tensor, threshold: float, decomposition: str, linears: _Linears) -> list[Tensor]:
    M, K = x.shape
    N = sum(linears.widths)
    arch, processors = configs.architecture(x.device), configs.multiprocessors(x.device)
    config = configs.decode_configs(arch, N, processors)[-1]
    parts = configs.split_k(config, N, K, processors)
    if parts > 1:
        outputs = linears.outputs(x, parts, M, dtype=torch.float32)
    else:
        outputs = linears.outputs(x, M, dtype=x.dtype)
    x_int8, x_scale, source = x, x, x  # the first two are not read
    fused = threshold == 0 or decomposition == "token" or M == 1
    if fused:
        x_int8, x_scale, x_outlier, _ = quantize_reference(x, threshold, decomposition)
        source = x if threshold == 0 else x_outlier
    flags = linears.flags
    if parts > 1:
        flags["HAS_BIAS"] = False  # part of the sum
    tiles = sum(-(-width // config.block_n) for width in linears.widths)
    wrap_triton(decode_kernel)[(tiles, parts)](
        source,
        x_int8,
        x_scale,
        *linears.pointers,
        *_output_pointers(outputs),
        M,
        *linears.N,
        K,
        threshold,
        BLOCK_M=MAX_M,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=parts,
        SCALE_BLOCK=configs.SCALE_BLOCK,
        QUANTIZE=not fused,
        EVEN_K=K % config.block_k == 0,
        HAS_OUTLIERS=threshold != 0,
        COLUMN=not fused,
        PRECISION=_precision(x.dtype, arch),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **flags,
    )
    if parts == 1:
        return outputs
    biases: list[Any] = linears.biases or [None] * len(outputs)
    return [sum_of_parts(output, bias, x.dtype) for output, bias in zip(outputs, biases, strict=True)]


def _product(x: Tensor, threshold: float, decomposition: str, linears: _Linears) -> list[Tensor]:
    M, K = x.shape
    arch = configs.architecture(x.device)
    config = configs.gemm_configs(arch, M, sum(linears.widths), x.dtype)[-1]
    x_int8, x_scale, x_gathered, w_gathered, count = _quantize(x, threshold, decomposition, linears)
    outputs = linears.outputs(x, M, dtype=x.dtype)
    tiles = sum(-(-width // config.block_n) for width in linears.widths)
    wrap_triton(gemm_kernel)[(-(-M // config.block_m) * tiles,)](
        x_int8,
        x_scale,
        x_gathered,
        w_gathered,
        count,
        *linears.pointers,
        *_output_pointers(outputs),
        M,
        *linears.N,
        K,
        x_gathered.shape[-1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_O=BLOCK_O,
        GROUP_M=_GROUP_M,
        UNROLL=config.unroll,
        EVEN_K=K % (config.block_k * config.unroll) == 0,
        HAS_OUTLIERS=threshold != 0,
        PRECISION=_precision(x.dtype, arch),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **linears.flags,
    )
    return outputs


def _quantize(
    x: Tensor, threshold: float, decomposition: str, linears: _Linears
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the product reads: ``x_int8, x_scale, x_gathered, w_gathered, count``."""
    M, K = x.shape
    fused = threshold == 0 or decomposition == "token"
    if fused:
        x_int8, x_scale, source, _ = quantize_reference(x, threshold, decomposition)
    else:
        x_int8 = torch.empty((M, K), dtype=torch.int8, device=x.device)
        x_scale = torch.empty((M,), dtype=torch.float32, device=x.device)
        source = x
    if threshold == 0:
        return x_int8, x_scale, x, x, x_scale  # the last three are not read
    capacity = -(-K // BLOCK_O) * BLOCK_O
    x_gathered = torch.empty((M, capacity), dtype=x.dtype, device=x.device)
    w_gathered = torch.empty((sum(linears.widths), capacity), dtype=x.dtype, device=x.device)
    columns = torch.empty((K,), dtype=torch.int32, device=x.device)
    count = torch.empty((1,), dtype=torch.int32, device=x.device)
    shape = launch_shape(K)
    weight_rows = shape["WEIGHT_ROWS"]
    programs = -(-M // shape["ROWS"]) + sum(-(-width // weight_rows) for width in linears.widths)
    wrap_triton(quantize_gather_kernel)[(programs,)](
        source,
        witness_rows(x, threshold),
        *padded(linears.weights),
        x_int8,
        x_scale,
        x_gathered,
        w_gathered,
        columns,
        count,
        M,
        *linears.N,
        K,
        capacity,
        threshold,
        QUANTIZE=not fused,
        **shape,
    )
    return x_int8, x_scale, x_gathered, w_gathered, count


def _precision(dtype: torch.dtype, arch: str) -> str:
    """Of the outlier product: three tf32 products are as good as fp32, where there is tf32."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


# --- gradients: straight-through, as in kernels/ops.py --------------------------------------------


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, _, weights, w_scales, biases = inputs
    ctx.save_for_backward(*weights, *w_scales)
    ctx.bias_dtypes = [bias.dtype for bias in biases]


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple:
    count = len(ctx.saved_tensors) // 2
    weights, w_scales = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    grad_x = sum(
        grad @ (weight.to(torch.float32) * w_scale.unsqueeze(1)).to(grad.dtype)
        for grad, weight, w_scale in zip(grads, weights, w_scales, strict=True)
    )
    grad_biases = [
        grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)
        for grad, dtype in zip(grads, ctx.bias_dtypes, strict=False)
    ]
    none = [None] * count
    return grad_x, None, None, none, none, grad_biases


quantized_linears.register_autograd(_backward, setup_context=_setup)
