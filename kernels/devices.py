"""The devices of ``kernels/table.py``, a row each. ``import int8fx`` reads this file."""

from typing import Any

from int8fx.kernels import table
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.gpu import device as gpu
from int8fx.kernels.gpu import packing
from int8fx.kernels.ops import int8_linear as ops


def _cpu_operator() -> tuple[Any, int]:
    return ops.quantized_linears_cpu, 64


def _cpu_attends(few: bool) -> bool:
    return few or cpu.isa() != "amx_int8"  # torch's multiplies many rows by AMX


table.KERNELS.update(
    {
        "cpu": table.Kernel(
            "C++",
            cpu.load,
            cpu.pack,
            cpu.packed_shape,
            cpu.unpack,
            joined=_cpu_operator,
            attends=_cpu_attends,
        ),
        "cuda": table.Kernel(
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
    }
)
