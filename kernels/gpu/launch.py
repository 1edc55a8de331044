"""What launching a kernel takes, whichever it is: a row of its table, memory, a precision."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from int8fx.kernels.gpu import configs, tuning


def launch(
    kernel: Any,
    candidates: Sequence[configs.GemmConfig] | Sequence[configs.DecodeConfig],
    K: int,
    grid: Callable[[dict[str, Any]], tuple[Any, ...]],
    *args: Any,
    **constants: Any,
) -> None:
    """Launches with the last of the candidates, or, while tuning, with the fastest of them."""
    if tuning.enabled() and len(candidates) > 1:
        wrap_triton(_tuned(kernel, tuple(candidates), K))[grid](*args, **constants)
        return
    chosen = candidates[-1]
    constants |= chosen.constants(K)
    wrap_triton(kernel)[grid(constants)](
        *args, **constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages
    )


@functools.cache
def _tuned(kernel: Any, candidates: tuple[Any, ...], K: int) -> Any:
    tried = [
        triton.Config(candidate.constants(K), candidate.num_warps, candidate.num_stages)
        for candidate in candidates
    ]
    return triton.autotune(tried, key=[])(kernel)


def empty(x: Tensor, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def precision(dtype: torch.dtype, arch: str) -> str:
    """Of the outlier product: three tf32 products are as good as fp32, where there is tf32."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"
