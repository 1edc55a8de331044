"""What Inductor's kernel of a norm costs to issue, with and without what int8 linears put into it.

    python tests/gpuless/norm_kernels.py sm_90 sm_80

prints as JSON, by architecture, what is added to the norm, and K: the instructions of a warp that
computes a row, and how many warps do. A process of its own: it pretends to have a GPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from layers import generated, inductors_own, serve_cpu_tensors_with_gpu_kernels
from nogpu import fake_cuda, offline, sass
from nogpu.inductor import Kernel
from torch import nn

from int8fx.kernels.gpu.columns import witness_rows
from int8fx.kernels.gpu.rounding import quantize_rows

WIDTHS = (4096, 14336)


class NormLinear(nn.Module):
    def __init__(self, K: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(K), nn.Linear(K, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class Marked(nn.Module):
    """A norm whose result is not written, which was tried, and is not used: int8 with -128 in the place
    of an outlier. Without ``values`` it lacks what else the product needs: the witness of columns, and
    the outliers, each at its place of an uninitialised ``[K, M]``; what is no outlier goes to one of
    many places that nobody reads, the same for the lanes of a warp."""

    values = False

    def __init__(self, K: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.norm(x)
        is_outlier = h.to(torch.float32).abs() >= 6.0
        x_int8, x_scale, _ = quantize_rows(h, 6.0)
        marked = torch.where(is_outlier, -128, x_int8), x_scale
        if not self.values:
            return marked
        (M, K), warp = h.shape, 256
        row, column = torch.arange(M, device=h.device).unsqueeze(1), torch.arange(K, device=h.device)
        elsewhere = M * K + 16 * (row % 64 * (K // warp) + column // warp)
        memory = torch.empty(M * K + 16 * 64 * (K // warp), dtype=h.dtype, device=h.device)
        target = torch.where(is_outlier, column * M + row, elsewhere)
        return *marked, torch.index_put(memory, (target,), h), witness_rows(h, 6.0)


class Scattered(Marked):
    """All of it."""

    values = True


# What is in the norm's kernel: a module, its backend, M and options.
KINDS: dict[str, tuple[type[nn.Module], str, int, dict[str, Any]]] = {
    "fp16": (NormLinear, "inductor", 4096, {}),
    "digits": (NormLinear, "llmint8", 16, {"decomposition": "token"}),  # as one row in either
    "column": (NormLinear, "llmint8", 4096, {"decomposition": "column"}),
    "token": (NormLinear, "llmint8", 4096, {"decomposition": "token"}),
    "none": (NormLinear, "llmint8", 4096, {"threshold": 0.0}),
    "marked": (Marked, "inductor", 4096, {}),
    "scattered": (Scattered, "inductor", 4096, {}),
}


# What is compared on one GPU alone.
ONLY_FIRST = ("none", "marked", "scattered")


def kernel(kind: str, K: int) -> Kernel:
    """The generated kernel."""
    module, backend, M, options = KINDS[kind]
    # As int8fx has it: a row is not split, so that a norm is one kernel.
    options = options if backend == "llmint8" else {**options, "split_reductions": False}
    model = module(K).to(torch.float16).requires_grad_(False)
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
    for kind in KINDS:
        for K in WIDTHS:
            norm = kernel(kind, K)
            for arch in architectures[:1] if kind in ONLY_FIRST else architectures:
                table[arch].setdefault(kind, {})[K] = issued(norm, arch, K)
    print(json.dumps(table))


if __name__ == "__main__":
    main(sys.argv[1:])
