"""Which kernel serves ``int8_linear`` on which device: one table.

A row names the device, how a ``w_int8 [N, K]`` is packed for the kernel and back, and how the
kernel is loaded. A kernel that cannot be loaded gives its reason, and the reference serves on a CPU.
On a GPU nothing does: the reference would be slower than the 16-bit linear that it replaces, so linears
stay in float, with that reason.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """One implementation of ``int8_linear``.

    Attributes:
        name: as reports show it.
        load: registers the kernel; None, or the reason why it cannot serve here.
        pack: ``w_int8 [N, K]`` to the tensor that the kernel takes as ``weight``.
        reason: why this one serves instead of a faster one, or empty.
        packed_shape: of the packed form of an ``[N, K]`` weight.
        unpack: ``(weight, N, K)`` back to ``w_int8 [N, K]``, bit for bit.
        falls_back: whether the reference serves where this kernel cannot be loaded.
        joined: where the kernel quantises by itself, the operator that takes ``x`` and several
            linears of it, and how many at most (``passes/int8/join_linears.py``).
        normed: the operator that takes the place of ``joined``'s and of the norm that it reads
            (``passes/int8/fuse_norms.py``); None: there is none.
        experts: the operator that takes the place of ``expert_linear``, with its arguments
            (``kernels/ops/expert_linear.py``); None: that one serves.
        attends: whether its ``attention`` of few rows, or of many, is faster than torch's
            (``kernels/ops/attention.py``).
        whole_rows: whether Inductor generates the quantisation of a row, in the kernel that computes
            the row, so that it must not split long rows.
        slower: why a scheme's product, by the scheme's name and a number of rows, would be slower than
            the 16-bit one, so that it stays in float; or empty.
    """

    name: str
    load: Callable[[], str | None]
    pack: Callable[[Tensor], Tensor]
    packed_shape: Callable[[int, int], tuple[int, int]]
    unpack: Callable[[Tensor, int, int], Tensor]
    reason: str = ""
    falls_back: bool = True
    joined: Callable[[], tuple[Any, int]] | None = None
    normed: Callable[[], Any] = lambda: None
    experts: Callable[[], Any] = lambda: None
    attends: Callable[[bool], bool] = lambda few: False
    whole_rows: bool = False
    slower: Callable[[str, Any], str] = lambda scheme, rows: ""

    def operators(self) -> frozenset[Any]:
        """The operators of this kernel that take x and quantise it, once it is loaded."""
        joined = self.joined()[0] if self.joined is not None else None
        return frozenset((joined, self.normed(), self.experts())) - {None}


def as_it_is(w_int8: Tensor) -> Tensor:
    return w_int8


def same_shape(N: int, K: int) -> tuple[int, int]:
    return N, K


def still_as_it_is(weight: Tensor, N: int, K: int) -> Tensor:
    return weight


REFERENCE = Kernel("plain PyTorch", lambda: None, as_it_is, same_shape, still_as_it_is)

# The row of each device; ``kernels/devices.py`` writes them.
KERNELS: dict[str, Kernel] = {}


@functools.cache
def kernel_for(device_type: str) -> Kernel | None:
    """The kernel that serves a device, loaded; None when none does (``refusal`` says why)."""
    kernel = KERNELS.get(device_type)
    if kernel is None:
        return None
    reason = kernel.load()
    if reason is None:
        return kernel
    if not kernel.falls_back:
        log.info("int8 kernel %r cannot serve %s: %s", kernel.name, device_type, reason)
        return None
    log.info(
        "int8 kernel %r cannot serve %s, %s will: %s",
        kernel.name,
        device_type,
        REFERENCE.name,
        reason,
    )
    return dataclasses.replace(REFERENCE, reason=reason)


def refusal(device_type: str) -> str | None:
    """Why no kernel serves a device, or None."""
    if kernel_for(device_type) is not None:
        return None
    kernel = KERNELS.get(device_type)
    reason = None if kernel is None else kernel.load()
    return f"no int8 kernel for device {device_type!r}" + (f": {reason}" if reason else "")


def joined(device_type: str) -> tuple[Any, int] | None:
    """``Kernel.joined`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return None if kernel is None or kernel.joined is None else kernel.joined()


def normed(device_type: str) -> Any:
    """``Kernel.normed`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return None if kernel is None else kernel.normed()


def experts(device_type: str) -> Any:
    """``Kernel.experts`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return None if kernel is None else kernel.experts()


def with_whole_rows() -> frozenset[Any]:
    """The operators of x ``[*, K]`` in front of which Inductor must not split a row."""
    asking = [device for device, kernel in KERNELS.items() if kernel.whole_rows]
    serving = [kernel for device in asking if (kernel := kernel_for(device)) and kernel.whole_rows]
    return frozenset().union(*(kernel.operators() for kernel in serving))


def attends(device_type: str, few: bool) -> bool:
    """``Kernel.attends`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return kernel is not None and kernel.attends(few)


def slower(device_type: str, scheme: str, rows: Any) -> str:
    """``Kernel.slower`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return "" if kernel is None else kernel.slower(scheme, rows)


def describe(device_types: Collection[str]) -> dict[str, str]:
    """What serves these device types, and why when it is not the fastest, or nothing does; only those
    of the table. Asking loads a kernel, which may be to build it."""
    described = {}
    for device in [device for device in KERNELS if device in device_types]:
        kernel = kernel_for(device)
        if kernel is None:
            described[device] = f"none ({refusal(device)})"
        else:
            described[device] = kernel.name + (f" ({kernel.reason})" if kernel.reason else "")
    return described


def pack(w_int8: Tensor) -> Tensor:
    """``w_int8 [N, K]`` in the form that the kernel of its device takes; ``[E, N, K]`` one by one."""
    kernel = _serving(w_int8)
    if w_int8.dim() == 3:
        return torch.stack([kernel.pack(matrix) for matrix in w_int8])
    return kernel.pack(w_int8)


def packed_shape(w_int8: Tensor) -> tuple[int, int]:
    """The shape of ``pack(w_int8)``."""
    return _serving(w_int8).packed_shape(*w_int8.shape)


def _serving(w_int8: Tensor) -> Kernel:
    kernel = kernel_for(w_int8.device.type)
    if kernel is None:
        raise ValueError(f"{refusal(w_int8.device.type)}; devices with one: {', '.join(KERNELS)}")
    return kernel


def unpack(weight: Tensor, N: int, K: int) -> Tensor:
    """The ``[N, K]`` int8 weight in a packed one, whichever kernel it was packed for."""
    if tuple(weight.shape) == (N, K):
        return weight.clone()  # an operator's output may not alias its input
    return KERNELS[weight.device.type].unpack(weight, N, K)
