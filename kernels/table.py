"""Which kernel serves an operator on weights of a format, on which device: one table.

A row has the operator, the format's family and the device for its key. It says how the integers of a
weight are laid out for the kernel and back, and how the kernel is loaded. A kernel that cannot be
loaded gives its reason, and the reference serves on a CPU. On a GPU nothing does: the reference would
be slower than the 16-bit linear that it replaces, so linears stay in float, with that reason.

A product without a row on any device is made of torch's operators: the weight is de-quantised at each
call and multiplied in float. ``without_kernel`` says so, and reports and ``explain`` show it.
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
    """One implementation of an operator.

    Attributes:
        name: as reports show it.
        load: registers the kernel; None, or the reason why it cannot serve here.
        pack: the first part of a weight, as ``w_int8 [N, K]``, to the tensor that the kernel takes. The
            other parts it takes as they are stored.
        packed_shape: of the packed form of a first part of a shape.
        unpack: ``(packed, *shape)`` back to the first part, bit for bit.
        reason: why this one serves instead of a faster one, or empty.
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
        without_experts: why rows that each meet the matrix of their expert stay in float, or empty.
        optional: whether a device without this kernel makes the product of torch's operators, of the
            weight as it is stored, which this one takes as well.
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
    without_experts: str = ""
    optional: bool = False
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

# What most schemes multiply by, and what it takes.
INT8_LINEAR = "int8_linear"
INT8 = "int8"

Key = tuple[str, str, str]  # operator, family of the format, type of the device


def key_of(device_type: str, family: str = INT8, operator: str = INT8_LINEAR) -> Key:
    return operator, family, device_type


# ``kernels/devices.py`` writes its rows.
KERNELS: dict[Key, Kernel] = {}


class _Remembered:
    """As ``functools.cache`` does it, and Dynamo traces a call: what was found is in a dict, where that
    takes the function apart, which loads a kernel under a lock."""

    def __init__(self, find: Callable[[str, str, str], Kernel | None]) -> None:
        self._find = find
        self._found: dict[Key, Kernel | None] = {}
        functools.update_wrapper(self, find)

    def __call__(
        self, device_type: str, family: str = INT8, operator: str = INT8_LINEAR
    ) -> Kernel | None:
        key = key_of(device_type, family, operator)
        if key not in self._found:
            self._found[key] = self._find(device_type, family, operator)
        return self._found[key]

    def cache_clear(self) -> None:
        self._found.clear()


@_Remembered
def kernel_for(device_type: str, family: str, operator: str) -> Kernel | None:
    """The kernel that serves a device, loaded; None when none does (``refusal`` says why)."""
    kernel = KERNELS.get(key_of(device_type, family, operator))
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


def has_kernel(family: str, operator: str) -> bool:
    """Whether the products of an operator on weights of a family are a kernel's on all devices."""
    found = (kernel for key, kernel in KERNELS.items() if key[:2] == (operator, family))
    return any(not kernel.optional for kernel in found)


def refusal(device_type: str, family: str = INT8, operator: str = INT8_LINEAR) -> str | None:
    """Why a product stays in float on a device, or None: what others have, it has not."""
    if not has_kernel(family, operator) or kernel_for(device_type, family, operator) is not None:
        return None
    kernel = KERNELS.get(key_of(device_type, family, operator))
    reason = None if kernel is None else kernel.load()
    return f"no int8 kernel for device {device_type!r}" + (f": {reason}" if reason else "")


def without_kernel(weights: str, family: str, operator: str, device_type: str) -> str:
    """Why a product on weights of a format, by its name, is made of torch's operators; or empty."""
    if has_kernel(family, operator) or kernel_for(device_type, family, operator) is not None:
        return ""
    return f"no kernel for {weights}: de-quantised at each call and multiplied in float"


def joined(device_type: str) -> tuple[Any, int] | None:
    """``Kernel.joined`` of the kernel that serves a device."""
    return joined_by(INT8_LINEAR, device_type)


def joined_by(operator: str, device_type: str, family: str = INT8) -> tuple[Any, int] | None:
    """The same of the kernel that serves an operator."""
    kernel = kernel_for(device_type, family, operator)
    return None if kernel is None or kernel.joined is None else kernel.joined()


def normed(device_type: str) -> Any:
    """``Kernel.normed`` of the kernel that serves a device."""
    return normed_by(INT8_LINEAR, device_type)


def normed_by(operator: str, device_type: str) -> Any:
    """The same of the kernel that serves an operator."""
    kernel = kernel_for(device_type, operator=operator)
    return None if kernel is None else kernel.normed()


def experts(device_type: str) -> Any:
    """``Kernel.experts`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return None if kernel is None else kernel.experts()


def without_experts(device_type: str, operator: str) -> str:
    """``Kernel.without_experts`` of the kernel that serves an operator on a device."""
    kernel = kernel_for(device_type, operator=operator)
    return "" if kernel is None else kernel.without_experts


def with_whole_rows() -> frozenset[Any]:
    """The operators of x ``[*, K]`` in front of which Inductor must not split a row."""
    asking = [device for device in devices() if KERNELS[INT8_LINEAR, INT8, device].whole_rows]
    serving = [kernel for device in asking if (kernel := kernel_for(device)) and kernel.whole_rows]
    return frozenset().union(*(kernel.operators() for kernel in serving))


def attends(device_type: str, few: bool) -> bool:
    """``Kernel.attends`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return kernel is not None and kernel.attends(few)


def devices() -> list[str]:
    """The types of device that have a kernel for ``int8_linear``."""
    return [device for operator, family, device in KERNELS if (operator, family) == (INT8_LINEAR, INT8)]


def slower(device_type: str, scheme: str, rows: Any) -> str:
    """``Kernel.slower`` of the kernel that serves a device."""
    kernel = kernel_for(device_type)
    return "" if kernel is None else kernel.slower(scheme, rows)


def describe(device_types: Collection[str]) -> dict[str, str]:
    """What serves these device types, and why when it is not the fastest, or nothing does; only those
    of the table. Asking loads a kernel, which may be to build it."""
    described = {}
    for device in [device for device in devices() if device in device_types]:
        kernel = kernel_for(device)
        if kernel is None:
            described[device] = f"none ({refusal(device)})"
        else:
            described[device] = kernel.name + (f" ({kernel.reason})" if kernel.reason else "")
    return described


def pack(codes: Tensor, family: str = INT8) -> Tensor:
    """The integers ``[N, ...]`` of a weight as the kernel of their device takes them; ``[E, N, ...]``
    one by one.

    Raises:
        ValueError: the device has no kernel, and others have.
    """
    kernel = _serving(codes, family)
    if codes.dim() == 3:
        return torch.stack([kernel.pack(matrix) for matrix in codes])
    return kernel.pack(codes)


def packed_shape(codes: Tensor, family: str = INT8) -> tuple[int, int]:
    """The shape of ``pack(codes)``."""
    return _serving(codes, family).packed_shape(*codes.shape)


def _serving(codes: Tensor, family: str) -> Kernel:
    device = codes.device.type
    kernel = kernel_for(device, family, _operator(device, family))
    if kernel is None:
        known = ", ".join(devices())
        raise ValueError(f"{refusal(device, family)}; devices with one: {known}")
    return kernel


def _operator(device_type: str, family: str) -> str:
    """One of the operators on a family: all of a device's take the same layout."""
    found = (key[0] for key in KERNELS if key[1:] == (family, device_type))
    return next(found, INT8_LINEAR)


def lays_out(device_type: str, family: str) -> bool:
    """Whether a kernel of a device has a layout of its own for weights of a family."""
    kernel = kernel_for(device_type, family, _operator(device_type, family))
    return kernel is not None and not kernel.optional


def unpack(weight: Tensor, N: int, K: int, family: str = INT8) -> Tensor:
    """The ``[N, K]`` integers in a packed weight, whichever kernel it was packed for."""
    if tuple(weight.shape) == (N, K):
        return weight.clone()  # an operator's output may not alias its input
    device = weight.device.type
    return KERNELS[key_of(device, family, _operator(device, family))].unpack(weight, N, K)
