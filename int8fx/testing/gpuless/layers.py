"""Wrappers that are generated and not run: for counting launches, and for compiling their kernels."""

import contextlib
import functools
from collections.abc import Iterable

import torch
import transformers
from torch import nn

from int8fx.kernels import table
from int8fx.testing.gpuless.blocks import Hidden
from int8fx.testing.nogpu import offline, sass
from int8fx.testing.nogpu.inductor import Kernel, NotExecuted, Wrapper, retargeted

LAYER_WIDTH = 512
OF_EXPERTS = ("quantize_experts_kernel", "expert_gemm_kernel")
OF_ROTATED = ("rotate_kernel", "rotated_gemm_kernel")
OF_GROUPS = ("grouped_gemm_kernel",)
OURS = (
    *("decode_kernel", "norm_kernel", "quantize_gather_kernel", "gemm_kernel"),
    *OF_EXPERTS,
    *OF_ROTATED,
    *OF_GROUPS,
)


def serve_cpu_tensors_with_gpu_kernels() -> None:
    """The harness retargets after our passes, which see the device that the tensors are on. What a GPU
    has no kernel for, they have none for, either."""
    for key in [key for key in table.KERNELS if key[2] == "cpu"]:
        del table.KERNELS[key]
    for operator, family, device in list(table.KERNELS):
        if device == "cuda":
            table.KERNELS[operator, family, "cpu"] = table.KERNELS[operator, family, device]
    table.kernel_for.cache_clear()


def decoder_layer(dtype: torch.dtype) -> nn.Module:
    """One layer of Llama with attention as one call, at a width where each projection fills tiles."""
    config = transformers.LlamaConfig(
        hidden_size=LAYER_WIDTH,
        intermediate_size=2 * LAYER_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=128,
        attn_implementation="sdpa",
    )
    return Hidden(transformers.LlamaModel(config)).to(dtype).requires_grad_(False).eval()


def layer_input(M: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, M, LAYER_WIDTH, dtype=dtype)


@functools.cache
def generated_layer(M: int, dtype: torch.dtype, backend: str = "llmint8") -> Wrapper:
    """What Inductor generates for one decoder layer and M tokens."""
    return generated(decoder_layer(dtype), layer_input(M, dtype), backend)


def generated(
    model: nn.Module,
    x: torch.Tensor,
    backend: str = "llmint8",
    mode: str | None = None,
    **options: object,
) -> Wrapper:
    """What Inductor generates for one call of a model."""
    torch._dynamo.reset()
    more = {"mode": mode} if mode else {"options": options or None}
    with torch.no_grad(), retargeted(execute=False) as wrappers, contextlib.suppress(NotExecuted):
        torch.compile(model, backend=backend, fullgraph=True, **more)(x)
    (wrapper,) = wrappers
    return wrapper


def inductors_own(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    """The kernels that Inductor wrote, by their source without their name: each of them once.

    Ours are left to the compiled tier, which has them in all configurations.
    """
    return {
        kernel.source.replace(kernel.name, ""): kernel
        for kernel in kernels
        if not kernel.name.startswith(OURS)
    }


def assert_compile_without_spills(kernels: Iterable[Kernel], arch: str) -> None:
    """Each in its first configuration, for a GPU by the name of its architecture.

    Raises:
        AssertionError: one spills, or does not fit a multiprocessor.
    """
    for kernel in kernels:
        seen = sass.inspect(offline.compile_generated(kernel, arch, first=True)[0])
        assert seen.blocks_per_multiprocessor >= 1, (kernel.name, arch)
        # The range reduction of sin and cos keeps a table on the stack; that is no spill.
        has_table = "_sin_" in kernel.name or "_cos_" in kernel.name
        assert seen.spill_bytes == 0 or has_table, (kernel.name, arch)
