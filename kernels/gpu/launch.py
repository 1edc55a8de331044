"""What launching a kernel takes, whichever it is: a row of its table, memory, a precision."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from int8fx.kernels.gpu import tuning

# What a choice depends on, beside the candidates, which follow M's class: by M itself, each number of
# rows would be tried anew.
_SIZES = ("N", "N0", "N1", "N2", "K", "E")


class Config(Protocol):
    """A row of a kernel's table."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...

    def constants(self, K: int) -> dict[str, int | bool]:
        """The kernel's constants, for rows of K elements."""


def launch(
    kernel: Any,
    candidates: Sequence[Config],
    K: int,
    grid: Callable[[dict[str, Any]], tuple[Any, ...]],
    *args: Any,
    **constants: Any,
) -> None:
    """Launches with the last of the candidates, or, while tuning, with the fastest of them."""
    if tuning.enabled() and len(candidates) > 1:
        run(_tuned(kernel, tuple(candidates), K), grid, *args, **constants)
        return
    chosen = candidates[-1]
    constants |= chosen.constants(K)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    run(kernel, grid(constants), *args, **constants, **options)


def run(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    """Launches on the device of the operands, which may not be the current one.

    The parameters of a launched kernel are a flat list, of which it makes the tuples that the functions
    below it take. Inductor (torch 2.11 to 2.14) knows what a kernel reads and writes by the names of
    its parameters. A tensor in a tuple has none: nothing seems to be written, and the launch is dropped
    as dead code. Sizes in a tuple are an error. Constants may come in a tuple, but Triton (3.6 to 3.9)
    takes them out of it by index alone, one by one, which is longer than the list.

    Raises:
        TypeError: an operand is a tuple.
    """
    if any(isinstance(each, tuple) for each in args):
        raise TypeError(f"an operand of {kernel} is a tuple, of which Inductor sees no tensor")
    device = next(each.device for each in args if isinstance(each, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        wrap_triton(kernel)[grid](*args, **constants)


@functools.cache
def _tuned(kernel: Any, candidates: tuple[Any, ...], K: int) -> Any:
    tried = [
        triton.Config(candidate.constants(K), candidate.num_warps, candidate.num_stages)
        for candidate in candidates
    ]
    key = [name for name in kernel.arg_names if name in _SIZES]
    return triton.autotune(tried, key=key)(kernel)


def empty(x: Tensor, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def precision(dtype: torch.dtype, arch: str) -> str:
    """Of the outlier product: three tf32 products are as good as fp32, where there is tf32."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"
