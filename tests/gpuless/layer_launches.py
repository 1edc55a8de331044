"""Prints how many kernels a Llama decoder layer launches, for benchmarks/gpu_kernels.py."""

import torch
from nogpu import fake_cuda

OURS = ("decode_kernel", "quantize_gather_kernel", "gemm_kernel")
HEADER = """\
# Launches of one Llama decoder layer

Counted in the wrapper that Inductor generates for an H100: two norms, seven linears, rotary embedding,
attention as one call, the model's final norm. Inductor is the same compile without int8.

| tokens | Inductor, bf16 | int8fx | of these ours |
|---|---|---|---|
"""


def main() -> None:
    fake_cuda.install("H100")
    from layers import (
        decoder_layer,
        generated,
        layer_input,
        serve_cpu_tensors_with_gpu_kernels,
    )

    serve_cpu_tensors_with_gpu_kernels()
    print(HEADER, end="")
    for M in (1, 16, 512):
        model, x = decoder_layer(torch.bfloat16), layer_input(M, torch.bfloat16)
        plain, int8 = generated(model, x, "inductor"), generated(model, x)
        ours = [name for name in int8.triton_launches if name.startswith(OURS)]
        print(f"| {M} | {len(plain.launches)} | {len(int8.launches)} | {len(ours)} |")


if __name__ == "__main__":
    main()
