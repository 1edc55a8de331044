"""How many kernels Inductor's wrapper launches, and which: read from the generated code."""

import functools
import importlib
import pkgutil

import pytest
import torch
import triton
from torch import nn

from int8fx import torch_private
from int8fx.kernels import gpu as gpu_kernels
from int8fx.kernels.gpu import configs
from int8fx.testing.gpuless import blocks
from int8fx.testing.gpuless.layers import (
    OF_EXPERTS,
    OURS,
    assert_compile_without_spills,
    generated,
    generated_layer,
    inductors_own,
    serve_cpu_tensors_with_gpu_kernels,
)
from int8fx.testing.nogpu import fake_cuda, offline
from int8fx.testing.nogpu.inductor import Kernel, Wrapper

# Inductor of torch 2.11 leaves apart what that of 2.13 fuses around our kernels: q's rotation from k's,
# and the search for an expert's outlier columns from what is quantised, once for each product.
IS_OLD = torch_private.release() < (2, 13)

fake_cuda.install("H100")
serve_cpu_tensors_with_gpu_kernels()


class NormLinear(nn.Module):
    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(K), nn.Linear(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


@pytest.mark.parametrize(
    ("M", "limit", "decomposition"),
    [(1, 2, "column"), (16, 2, "token"), (17, 3, "column"), (17, 3, "token"), (4096, 3, "column")],
)
def test_norm_and_linear(M, limit, decomposition):
    model = NormLinear(1024, 4096).to(torch.float16).requires_grad_(False)
    x = torch.empty(M, 1024, dtype=torch.float16)
    wrapper = generated(model, x, decomposition=decomposition)
    assert len(wrapper.launches) == limit, wrapper.launches
    assert not wrapper.extern_launches


@pytest.mark.parametrize(("M", "decomposition"), [(1, "column"), (16, "column"), (16, "token")])
def test_a_result_that_leaves_the_graph_is_summed_where_it_is_made(M, decomposition):
    """Few output channels: K is split, and whoever comes last to a tile adds up the parts."""
    model = NormLinear(4096, 256).to(torch.float16).requires_grad_(False)
    x = torch.empty(M, 4096, dtype=torch.float16)
    norm, decode = generated(model, x, decomposition=decomposition).launches
    assert norm.startswith("triton_") and decode.startswith("decode_kernel")


class GatedDown(nn.Module):
    """What reads gate and up, in a row that is longer than Inductor leaves in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(14336, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(x[0]) * x[1])


@pytest.mark.parametrize(("M", "launches"), [(1, 2), (16, 2), (17, 3)])
def test_a_long_row_is_quantised_in_one_launch(M, launches):
    model = GatedDown().to(torch.float16).requires_grad_(False)
    x = torch.empty(2, M, 14336, dtype=torch.float16)
    assert len(generated(model, x, decomposition="token").launches) == launches


def test_whoever_wants_long_rows_split_says_so():
    model = GatedDown().to(torch.float16).requires_grad_(False)
    x = torch.empty(2, 1, 14336, dtype=torch.float16)
    assert len(generated(model, x, inductor={"split_reductions": True}).launches) > 2


def test_other_reductions_are_split_as_ever():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = NormLinear(64, 512)

        def forward(self, x):
            return self.layer(x).float().square().mean()

    x = torch.empty(4096, 64, dtype=torch.float16)
    model = Loss().to(torch.float16).requires_grad_(False)
    whole = generated(model, x, inductor={"split_reductions": False}).launches
    assert len(generated(model, x).launches) == len(whole) + 1


def test_without_outliers_the_quantisation_is_in_the_norm():
    model = NormLinear(1024, 4096).to(torch.float16).requires_grad_(False)
    x = torch.empty(512, 1024, dtype=torch.float16)
    norm, product = generated(model, x, threshold=0.0).launches
    assert "amax" in norm
    assert product.startswith("gemm_kernel")


def test_split_k_is_summed_by_the_kernel_that_reads_the_result():
    narrow = NormLinear(4096, 64)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = narrow, nn.RMSNorm(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x[:, :64] + self.block(x))

    model = Residual().to(torch.float16).requires_grad_(False)
    wrapper = generated(model, torch.empty(4, 4096, dtype=torch.float16))
    assert "empty_strided_cuda((8, 4, 64)" in wrapper.body
    assert len(wrapper.launches) == 3, wrapper.launches


def tried(kernel: Kernel) -> list[dict]:
    """The configurations that a wrapper holds for one of our kernels."""
    return [{**c.kwargs, "num_warps": c.num_warps, "num_stages": c.num_stages} for c in kernel.configs]


def of_table(candidates: list[configs.GemmConfig] | list[configs.DecodeConfig], K: int) -> list[dict]:
    return [
        {**c.constants(K), "num_warps": c.num_warps, "num_stages": c.num_stages} for c in candidates
    ]


def launched_with(M: int, kernel: str, mode: str | None) -> list[dict]:
    """The configurations that the wrapper of a norm and a linear holds for one of our kernels."""
    model = NormLinear(1024, 16384).to(torch.float16).requires_grad_(False)
    wrapper = generated(model, torch.empty(M, 1024, dtype=torch.float16), mode=mode)
    (found,) = [one for one in wrapper.kernels if one.name.startswith(kernel)]
    return tried(found)


@pytest.mark.parametrize(
    ("M", "kernel"), [(16, "decode_kernel"), (64, "gemm_kernel"), (2048, "gemm_kernel")]
)
def test_max_autotune_tries_what_the_table_has_for_the_shape(M, kernel):
    """And the default takes one. That each of them compiles is the compiled tier's to show."""
    if M == 16:
        candidates = configs.decode_configs("sm_90", "quantises", 16384, 1024, 132)
    else:
        candidates = configs.gemm_configs("sm_90", M, 16384, 1024, torch.float16, 132)
    expected = of_table(candidates, 1024)
    assert len(expected) > 1
    assert launched_with(M, kernel, "max-autotune-no-cudagraphs") == expected
    (alone,) = launched_with(M, kernel, None)
    assert alone["num_stages"] == candidates[-1].num_stages


@pytest.mark.parametrize(("M", "ours", "norms"), [(1, 1, 0), (16, 1, 0), (64, 2, 2)])
def test_llama_decoder_layer(M, ours, norms):
    """Seven linears read four activations, so there are four groups; two of them follow a norm."""
    wrapper = generated_layer(M, torch.float16)
    launched = [name for name in wrapper.triton_launches if name.startswith(OURS)]
    assert len(launched) == 4 * ours + norms, launched
    assert sum(name.startswith("norm_kernel") for name in launched) == norms
    plain = generated_layer(M, torch.float16, "inductor")
    # Never more launches than in 16-bit: groups save what quantisation adds. A copy would be one more,
    # of what a kernel is taken to write to and something else reads afterwards.
    apart = IS_OLD and M == 64
    assert len(wrapper.launches) <= len(plain.launches) + apart, (wrapper.launches, plain.launches)


def test_no_two_triton_functions_have_one_name():
    """Inductor writes all that a kernel calls into one module, whatever they come from."""
    modules = [
        importlib.import_module(f"int8fx.kernels.gpu.{module.name}")
        for module in pkgutil.iter_modules(gpu_kernels.__path__)
    ]
    names = [
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__
    ]
    assert len(names) > 30
    assert len(names) == len(set(names))


def test_nothing_waits_for_the_device_and_no_shape_depends_on_data():
    for M in (16, 64):
        for call in (".item()", "synchronize", ".cpu()", "nonzero", "unbacked"):
            assert call not in generated_layer(M, torch.float16).body


@functools.cache
def generated_block(name: str, M: int, backend: str, **options: object) -> Wrapper:
    model = blocks.BLOCKS[name]().to(torch.bfloat16)
    return generated(model, torch.empty(1, M, blocks.WIDTH, dtype=torch.bfloat16), backend, **options)


@pytest.mark.parametrize(
    ("name", "M", "options", "ours", "added"),
    [
        ("mixtral", 64, {}, 4, 2),
        ("mixtral", 64, {"decomposition": "token"}, 4, 2),
        ("mixtral", 8, {"threshold": 0.0}, 2, 0),
        # Rows are sorted first, four small kernels; the two that copy a weight for every row are gone.
        ("gpt_oss", 8, {}, 4, 5),
    ],
    ids=str,
)
def test_experts(name, M, options, ours, added):
    """Gate and up, which are one product, and down: an added launch each, for the outlier columns."""
    wrapper = generated_block(name, M, "llmint8", **options)
    plain = generated_block(name, M, "inductor")
    launched = [one for one in wrapper.triton_launches if one.startswith(OF_EXPERTS)]
    assert len(launched) == ours, launched
    apart = 2 if IS_OLD and M == 64 and not options else 0
    assert len(wrapper.launches) - len(plain.launches) <= added + apart, (
        wrapper.launches,
        plain.launches,
    )
    for call in (".item()", "synchronize", ".cpu()", "nonzero", "unbacked"):
        assert call not in wrapper.body


class ExpertOfTheLargest(nn.Module):
    """Without a router that multiplies in float, which max-autotune would time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 192, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.weight[x[:, :5].argmax(-1)], x.unsqueeze(-1)).squeeze(-1)


def test_max_autotune_tries_what_the_table_has_for_experts():
    model, x = ExpertOfTheLargest().to(torch.bfloat16), torch.empty(128, 64, dtype=torch.bfloat16)
    wrapper = generated(model.requires_grad_(False), x, mode="max-autotune-no-cudagraphs")
    (product,) = (one for one in wrapper.kernels if one.name.startswith("expert_gemm_kernel"))
    expected = configs.expert_configs("sm_90", 128, 5, 192, torch.bfloat16)
    assert [config.block_n for config in expected] == [64, 128]
    assert tried(product) == of_table(expected, 64)


@functools.cache
def changed_by_quantisation() -> list[Kernel]:
    """Kernels of a decoder layer's wrapper that Inductor's without int8 has not."""
    changed: dict[str, Kernel] = {}
    for M in (16, 64):
        plain = inductors_own(generated_layer(M, torch.float16, "inductor").kernels)
        ours = inductors_own(generated_layer(M, torch.float16).kernels)
        changed |= {source: kernel for source, kernel in ours.items() if source not in plain}
    return list(changed.values())


@pytest.mark.parametrize("arch", offline.TARGETS)
def test_every_kernel_that_quantisation_changed_compiles_without_spills(arch):
    kernels = changed_by_quantisation()
    assert len(kernels) >= 6
    assert_compile_without_spills(kernels, arch)
