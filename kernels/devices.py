"""The devices of ``kernels/table.py``, a row each. ``import int8fx`` reads this file.

What passes and the rest of int8fx ask about a device is answered here and in ``kernels/table.py``, so
that no other file compares the type of a device.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from int8fx.kernels import table
from int8fx.kernels.cpu import grouped
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.formats import groups
from int8fx.kernels.gpu import device as gpu
from int8fx.kernels.gpu import grouped_packing, packing
from int8fx.kernels.ops import grouped_linear
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.rotated_linear import rotated_linears
from int8fx.kernels.schemes.static_columns import BESIDE_OUTLIERS
from int8fx.kernels.schemes.static_columns import OPERATOR as ROTATED
from int8fx.kernels.schemes.weight_only import GROUP_LINEAR


def _cpu_operator() -> tuple[Any, int]:
    return ops.int8_linears, 64


def _cpu_attends(few: bool) -> bool:
    return few or cpu.isa() != "amx_int8"  # torch's multiplies many rows by AMX


def _cpu_rotated_operator() -> tuple[Any, int]:
    return rotated_linears, 64


def _cuda_has_none_beside_outliers() -> str:
    return "outliers beside static columns are in the CPU's kernels alone"


_CPU = table.Kernel(
    "C++",
    cpu.load,
    cpu.pack,
    cpu.packed_shape,
    cpu.unpack,
    joined=_cpu_operator,
    attends=_cpu_attends,
)
_CPU_GROUPS = table.Kernel("C++", cpu.load, grouped.pack, grouped.packed_shape, grouped.unpack)
_CUDA_GROUPS = table.Kernel(
    "Triton",
    gpu.load,
    grouped_packing.pack,
    grouped_packing.packed_shape,
    grouped_packing.unpack,
    falls_back=False,
)
_CUDA_INT8_GROUPS = table.Kernel(
    "Triton",
    gpu.load,
    table.as_it_is,
    table.same_shape,
    table.still_as_it_is,
    falls_back=False,
    joined=gpu.group_operator,
    optional=True,
)
table.KERNELS.update(
    {
        table.key_of("cpu"): _CPU,
        table.key_of("cuda"): table.Kernel(
            "Triton",
            gpu.load,
            packing.pack,
            packing.packed_shape,
            packing.unpack,
            falls_back=False,
            joined=gpu.operator,
            normed=gpu.norm_operator,
            experts=gpu.expert_operator,
            whole_rows=True,
            slower=gpu.slower,
        ),
        **{
            table.key_of("cpu", grouped_linear.FAMILY, operator): _CPU_GROUPS
            for operator in grouped_linear.OPERATORS
        },
        table.key_of("cuda", grouped_linear.FAMILY, grouped_linear.INT8_ROWS): dataclasses.replace(
            _CUDA_GROUPS, joined=gpu.grouped_operator
        ),
        table.key_of("cuda", grouped_linear.FAMILY, grouped_linear.FLOAT_ROWS): dataclasses.replace(
            _CUDA_GROUPS, joined=gpu.grouped_float_operator
        ),
        table.key_of("cuda", groups.FAMILY, GROUP_LINEAR): _CUDA_INT8_GROUPS,
        table.key_of("cpu", operator=ROTATED): dataclasses.replace(_CPU, joined=_cpu_rotated_operator),
        table.key_of("cpu", operator=BESIDE_OUTLIERS): dataclasses.replace(_CPU, joined=None),
        table.key_of("cuda", operator=ROTATED): table.Kernel(
            "Triton",
            gpu.load,
            packing.pack,
            packing.packed_shape,
            packing.unpack,
            falls_back=False,
            joined=gpu.rotated_operator,
            normed=gpu.rotated_norm_operator,
            without_experts="the GPU's kernels of experts have no rotation",
        ),
        table.key_of("cuda", operator=BESIDE_OUTLIERS): table.Kernel(
            "none",
            _cuda_has_none_beside_outliers,
            table.as_it_is,
            table.same_shape,
            table.still_as_it_is,
            falls_back=False,
        ),
    }
)


@dataclass(frozen=True)
class FloatSpeed:
    """What is slow on a device of what stays in float, so that a pass writes it in another way.

    Attributes:
        attends_head_by_head: torch's attention of one query position is a product for each head
            (``passes/float/group_heads.py``).
        one_row_is_slow: a library's product of one row reads its weight slower than a sum that Inductor
            writes (``passes/float/one_row.py``).
        computing_again_is_slow: Inductor computes an expression again in each kernel that reads it, and
            that takes longer than a call (``passes/float/compute_once.py``).
    """

    attends_head_by_head: bool = False
    one_row_is_slow: bool = False
    computing_again_is_slow: bool = False


_FLOAT_SPEED = {"cpu": FloatSpeed(True, True, True)}


def float_speed(device_type: str) -> FloatSpeed:
    return _FLOAT_SPEED.get(device_type, FloatSpeed())


_MULTIPLY_ACTIVATIONS = ("cpu",)


def activations_reason(device_type: str) -> str:
    """Why a product of two activations is not in int8 on a device, or empty.

    A GPU has fused attention, which a product of its own, matrix by matrix, would only slow down.
    """
    if device_type in _MULTIPLY_ACTIVATIONS:
        return ""
    return (
        f"two activations on {device_type}: their int8 product is there on {_MULTIPLY_ACTIVATIONS} only"
    )


def same_kind(left: torch.device, right: torch.device) -> bool:
    """Whether one kernel serves both, so that what is packed for one is packed for the other."""
    return left.type == right.type


def has_memory(device: torch.device) -> bool:
    """Whether tensors there have contents."""
    return device.type != "meta"


def host_reads_all(device_types: Collection[str]) -> bool:
    """Whether the host has all that is computed on these types of device, as a fork of it does."""
    return all(host_reads(torch.device(each)) for each in device_types)


def host_reads(device: torch.device) -> bool:
    """Whether the host reads contents there without waiting for the device."""
    return device.type == "cpu"
