"""The rows of ``kernels/table.py``, one a device. ``import int8fx`` reads this file."""

import dataclasses
from typing import Any

from int8fx.kernels import table
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.gpu import device as gpu
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.schemes.static_columns import OPERATOR as ROTATED


def _cpu_operator() -> tuple[Any, int]:
    return ops.quantized_linears_cpu, 64


def _cpu_attends(few: bool) -> bool:
    return few or cpu.isa() != "amx_int8"  # torch's multiplies many rows by AMX


def _cuda_has_no_rotation() -> str:
    return "rotations and static columns are in the CPU's kernels alone"


_CPU = table.Kernel(
    "C++",
    cpu.load,
    cpu.pack,
    cpu.packed_shape,
    cpu.unpack,
    joined=_cpu_operator,
    attends=_cpu_attends,
)
table.KERNELS.update(
    {
        table.key_of("cpu"): _CPU,
        table.key_of("cuda"): table.Kernel(
            "Triton",
            gpu.load,
            table.as_it_is,
            table.same_shape,
            table.still_as_it_is,
            falls_back=False,
            joined=gpu.operator,
            normed=gpu.norm_operator,
            experts=gpu.expert_operator,
            whole_rows=True,
        ),
        table.key_of("cpu", operator=ROTATED): dataclasses.replace(_CPU, joined=None),
        table.key_of("cuda", operator=ROTATED): table.Kernel(
            "none",
            _cuda_has_no_rotation,
            table.as_it_is,
            table.same_shape,
            table.still_as_it_is,
            falls_back=False,
        ),
    }
)
