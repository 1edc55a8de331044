"""Where the kernel tests run: in the interpreter, or on the GPU where there is one."""

import functools
from typing import Any

import torch
from torch import Tensor

from int8fx.testing.nogpu import fake_cuda
from int8fx.testing.nogpu.interpreter import interpret


def is_on_a_gpu() -> bool:
    return torch.cuda.is_available() and not fake_cuda.is_installed()


def launchable(kernel: Any) -> Any:
    """What ``[grid](...)`` launches on CPU tensors, wherever that is."""
    if is_on_a_gpu():
        return Carried(kernel, torch.device("cuda"))
    return interpret(kernel)


class Carried:
    """A kernel whose operands are carried to a device, and back, with all the memory around them."""

    def __init__(self, kernel: Any, device: torch.device) -> None:
        self._kernel, self._device = kernel, device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        memory: dict[int, tuple[Tensor, Tensor]] = {}  # by address, so that operands stay shared

        def carry(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            storage = value.untyped_storage()
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            there = memory.setdefault(storage.data_ptr(), (here, here.to(self._device, copy=True)))[
                1
            ].untyped_storage()
            empty = torch.empty(0, dtype=value.dtype, device=self._device)
            return empty.set_(there, value.storage_offset(), value.shape, value.stride())

        carried = {name: carry(value) for name, value in kwargs.items()}
        self._kernel[grid](*map(carry, args), **carried)
        for here, there in memory.values():
            here.copy_(there)
