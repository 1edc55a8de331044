"""How many kernels Inductor's wrapper launches, and which: read from the generated code."""

import pytest
import torch
from layers import decoder_layer, generated, layer_input, serve_cpu_tensors_with_gpu_kernels
from nogpu import fake_cuda, offline, sass
from torch import nn

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


def test_without_outliers_the_quantisation_is_in_the_norm():
    model = NormLinear(1024, 4096).to(torch.float16).requires_grad_(False)
    x = torch.empty(512, 1024, dtype=torch.float16)
    norm, product = generated(model, x, threshold=0.0).launches
    assert "round" in norm
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


@pytest.mark.parametrize(("M", "ours"), [(1, 1), (16, 1), (64, 2)])
def test_llama_decoder_layer(M, ours):
    """Seven linears read four activations, so there are four groups."""
    x = layer_input(M, torch.float16)
    model = decoder_layer(torch.float16)
    wrapper = generated(model, x)
    names = ("decode_kernel", "quantize_gather_kernel", "gemm_kernel")
    launched = [name for name in wrapper.triton_launches if name.startswith(names)]
    assert len(launched) == 4 * ours, launched
    plain = generated(model, x, backend="inductor")
    # Never more launches than in 16-bit: groups save what quantisation adds.
    added = len(wrapper.launches) - len(plain.launches)
    assert added <= (0 if M <= 16 else 2), (wrapper.launches, plain.launches)


def test_nothing_waits_for_the_device_and_no_shape_depends_on_data():
    body = generated(decoder_layer(torch.float16), layer_input(64, torch.float16)).body
    for call in (".item()", "synchronize", ".cpu()", "nonzero", "unbacked"):
        assert call not in body


@pytest.mark.parametrize("M", [16, 64])
def test_every_kernel_of_the_wrapper_compiles_without_spills(M):
    wrapper = generated(decoder_layer(torch.float16), layer_input(M, torch.float16))
    for arch in ("sm_80", "sm_90"):
        for kernel in wrapper.kernels:
            for compiled in offline.compile_generated(kernel, arch):
                seen = sass.inspect(compiled)
                # The range reduction of sin and cos keeps a table on the stack; that is no spill.
                assert seen.spill_bytes == 0 or "_sin_" in kernel.name, kernel.name
