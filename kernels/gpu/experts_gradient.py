"""The gradient of an expert linear's input on a GPU: straight through the rounding of x.

    grad_x[s] = grad[s] @ ŵ[e],     ŵ[e] = w_int8[e] · w_scale[e]

in 16-bit with fp32 sums, with e the expert of row s, as ``ops.input_gradient`` has it for one linear.
The weights are de-quantised where they are read: in memory that would be a 16-bit copy of all experts.
Rows find their experts as in ``experts.py``; one without an expert has the gradient 0.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from int8fx.kernels.gpu import configs
from int8fx.kernels.gpu.gemm import tile_in_bands
from int8fx.kernels.gpu.launch import empty, precision, run
from int8fx.kernels.gpu.routing import block_of_experts, order_of, rows_of_tile, tiles

# One for all GPUs: a backward pass is not what these kernels are made for.
SHAPE = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 8}
LAUNCH = {"num_warps": 4, "num_stages": 2}


@triton.jit
def expert_gradient_kernel(
    grad_ptr,  # [S, N]
    ends_ptr,  # [E]
    order_ptr,  # [S], where ORDERED
    w_ptr,  # [E, N, K] int8
    w_scale_ptr,  # [E, N] fp32
    grad_x_ptr,  # [S, K]
    S, N, K, E,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_m, tile_k = tile_in_bands(tl.program_id(0), tl.num_programs(0) // tiles_k, tiles_k, GROUP_M)
    expert, _, first, last = rows_of_tile(tile_m, ends_ptr, S, E, BLOCK_M, BLOCK_E)
    if expert > E:
        return
    rows = first + tl.arange(0, BLOCK_M)
    m = tl.minimum(rows, last - 1)
    if ORDERED:
        m = tl.load(order_ptr + m)
    m = m.to(tl.int64)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = grad_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    w_row = expert.to(tl.int64) * N
    # Of rows without an expert none.
    for start in range(0, tl.where(expert < E, N, 0), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        grad = tl.load(grad_ptr + m[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0.0)
        inside = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + (w_row + n)[:, None] * K + k[None, :], mask=inside, other=0)
        w_scale = tl.load(w_scale_ptr + w_row + n, mask=n < N, other=0.0)
        w_hat = (w.to(tl.float32) * w_scale[:, None]).to(dtype)
        acc = tl.dot(grad, w_hat, acc, input_precision=PRECISION)
    inside = (rows < last)[:, None] & (k < K)[None, :]
    tl.store(grad_x_ptr + m[:, None] * K + k[None, :], acc.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton_op("int8fx::expert_linear_backward_gpu", mutates_args=())
def expert_linear_backward(
    grad: Tensor, weight: Tensor, w_scale: Tensor, experts: Tensor | None, ends: Tensor | None
) -> Tensor:
    """The formula above.

    Args:
        grad: ``[S, N]``, fp32, bf16 or fp16.
        weight, w_scale, experts, ends: as ``expert_linear``'s.

    Returns:
        ``[S, K]`` of grad's dtype, zero where rows of the weight were padded.
    """
    S, (E, N, K) = grad.shape[0], weight.shape
    order, ends = order_of(experts, ends, E)
    grad_x = empty(grad, (S, K), grad.dtype)
    blocks = tiles(S, E, SHAPE["BLOCK_M"]) * -(-K // SHAPE["BLOCK_K"])
    run(
        expert_gradient_kernel,
        (blocks,),
        grad.contiguous(),
        ends,
        ends if order is None else order,
        weight,
        w_scale,
        grad_x,
        S,
        N,
        K,
        E,
        BLOCK_E=block_of_experts(E),
        ORDERED=order is not None,
        PRECISION=precision(grad.dtype, configs.architecture(grad.device)),
        **SHAPE,
        **LAUNCH,
    )
    return grad_x
