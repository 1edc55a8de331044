"""What Inductor's kernel of a norm costs to issue, with and without what int8 linears put into it.

    python -m int8fx.testing.gpuless.norm_kernels sm_90 sm_80

prints as JSON, by architecture, what is added to the norm, and K: the instructions of a warp that
computes a row, and how many warps do. A process of its own: it pretends to have a GPU.
"""

import json
import sys
from typing import Any

import torch
from torch import nn

from int8fx.testing.gpuless.layers import generated, inductors_own, serve_cpu_tensors_with_gpu_kernels
from int8fx.testing.nogpu import fake_cuda, offline, sass
from int8fx.testing.nogpu.inductor import Kernel

WIDTHS = (4096, 14336)


class NormLinear(nn.Module):
    def __init__(self, K: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(K), nn.Linear(K, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


# What is in the norm's kernel: a backend, M and options; and for which K it is Inductor's.
KINDS: dict[str, tuple[str, int, dict[str, Any], tuple[int, ...]]] = {
    "fp16": ("inductor", 4096, {}, WIDTHS),
    "residues": ("llmint8", 16, {"decomposition": "token"}, WIDTHS),  # as one row in either
    "none": ("llmint8", 4096, {"threshold": 0.0}, WIDTHS),
}
# What is compared on one GPU alone.
ONLY_FIRST = ("none",)


def kernel(kind: str, K: int) -> Kernel:
    """The generated kernel."""
    backend, M, options, _ = KINDS[kind]
    # As int8fx has it: a row is not split, so that a norm is one kernel.
    options = options if backend == "llmint8" else {**options, "split_reductions": False}
    model = NormLinear(K).to(torch.float16).requires_grad_(False)
    x = torch.empty(M, K, dtype=torch.float16)
    (first,) = inductors_own(generated(model, x, backend, **options).kernels).values()
    return first


def issued(norm: Kernel, arch: str, K: int) -> tuple[int, int]:
    """Instructions of a warp for one row, and the warps of a row."""
    (config, *_) = norm.configs
    assert config.kwargs["XBLOCK"] == 1, config
    seen = sass.inspect(offline.compile_generated(norm, arch, first=True)[0])
    if seen.spill_bytes:
        print(f"{norm.name} spills {seen.spill_bytes} bytes on {arch}", file=sys.stderr)
    loops = [sum(loop.values()) for loop in seen.loops if sum(loop.values()) > 1]
    trips = -(-K // config.kwargs.get("R0_BLOCK", K))
    once = sum(seen.opcodes.values()) - seen.opcodes.get("NOP", 0)
    return once + (trips - 1) * sum(loops), config.num_warps


def main(architectures: list[str]) -> None:
    fake_cuda.install("H100")
    serve_cpu_tensors_with_gpu_kernels()
    table: dict[str, dict[str, dict[int, tuple[int, int]]]] = {arch: {} for arch in architectures}
    for kind, (_, _, _, widths) in KINDS.items():
        for K in widths:
            norm = kernel(kind, K)
            for arch in architectures[:1] if kind in ONLY_FIRST else architectures:
                table[arch].setdefault(kind, {})[K] = issued(norm, arch, K)
    print(json.dumps(table))


if __name__ == "__main__":
    main(sys.argv[1:])
