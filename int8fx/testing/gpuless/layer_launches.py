"""Prints how many kernels a Llama decoder layer launches, for benchmarks/gpu_kernels.py."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from int8fx.testing.nogpu import fake_cuda

LINEARS = 7
# What one Linear8bitLt of bitsandbytes 0.50 launches on CUDA for bf16 activations with outliers, read
# from its source in the order of execution: MatMul8bitLt.forward, backends/cuda/ops.py and
# backends/default/ops.py. Each operator that it calls is counted as one kernel, and nonzero as two.
BITSANDBYTES = (
    "x to fp16",
    "abs",
    "ge",
    "any",
    "any of columns",
    "nonzero, counting",
    "nonzero, writing",
    "int8_vector_quant",
    "zero the columns",  # unless there is one row
    "x[:, columns]",
    "w[:, columns]",
    "w * scale",
    "w * 1 / 127",
    "w to bf16",
    "int8 matmul",
    "mm_dequant",
    "y to bf16",
    "addmm",
)
SYNCHRONISATIONS = 2  # if outliers.any(), and nonzero
HEADER = f"""\
# Launches of one Llama decoder layer

Two norms, seven linears, rotary embedding, attention as one call, the model's final norm. *Inductor*,
in bf16, and *int8fx* are counted in the wrapper that Inductor generates for an H100, and *eager* in the
operators that PyTorch calls, views and allocations left out. *bitsandbytes* is eager with each linear
replaced by what Linear8bitLt of bitsandbytes 0.50 calls, according to its source, for activations with
outliers: {len(BITSANDBYTES)} kernels and {SYNCHRONISATIONS} host synchronisations, listed in
`int8fx/testing/gpuless/layer_launches.py`.

| tokens | Inductor | int8fx | of these ours | eager | bitsandbytes | host synchronisations |
|---|---|---|---|---|---|---|
"""


class Calls(TorchDispatchMode):
    """Counts operators that compute: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not is_view and not func._schema.name.startswith(("aten::empty", "aten::detach")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def eager_calls(model: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.no_grad(), Calls() as calls:
        model(x)
    return calls.names


def main() -> None:
    fake_cuda.install("H100")
    from int8fx.testing.gpuless.layers import (
        OURS,
        decoder_layer,
        generated_layer,
        layer_input,
        serve_cpu_tensors_with_gpu_kernels,
    )

    dtype = torch.bfloat16
    eager = {M: len(eager_calls(decoder_layer(dtype), layer_input(M, dtype))) for M in (1, 16, 512)}
    serve_cpu_tensors_with_gpu_kernels()
    print(HEADER, end="")
    for M, calls in eager.items():
        plain, int8 = generated_layer(M, dtype, "inductor"), generated_layer(M, dtype)
        ours = [name for name in int8.triton_launches if name.startswith(OURS)]
        theirs = calls + LINEARS * (len(BITSANDBYTES) - (M == 1) - 1)
        print(
            f"| {M} | {len(plain.launches)} | {len(int8.launches)} | {len(ours)} "
            f"| {calls} | {theirs} | {LINEARS * SYNCHRONISATIONS} |"
        )


if __name__ == "__main__":
    main()
