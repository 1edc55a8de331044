"""The GPU path on a GPU; without one it is collected, and skipped.

``tests/gpuless`` has the same tests for machines without: there kernels run in Triton's interpreter.
"""

import pytest
import torch

pytest.importorskip("triton")

from test_expert_kernels import *  # noqa: F403
from test_grouped_kernels import *  # noqa: F403
from test_kernels import *  # noqa: F403
from test_rotated_kernels import *  # noqa: F403

from int8fx.testing.gpuless.linear_bound import BF16, CASES, FP16, assert_within_the_derived_bound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize(("M", "dtype", "decomposition", "threshold"), CASES)
def test_a_linear_is_within_the_derived_bound_of_float64(M, dtype, decomposition, threshold):
    assert_within_the_derived_bound(M, dtype, decomposition, threshold, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("M", [1536, 2999])
def test_so_is_one_in_extended_tiles_and_plain_ones(M, dtype):
    """On an H100: elsewhere there are none that are extended (``configs.extended_tiles``)."""
    assert_within_the_derived_bound(M, dtype, "column", 6.0, torch.device("cuda"), N=4096)


@pytest.mark.parametrize("norm", [torch.nn.Identity, torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_a_captured_graph_serves_inputs_with_other_outliers(norm):
    """No synchronisation and no shape that depends on data, or capture and replay could not be."""
    model = torch.nn.Sequential(norm(256), torch.nn.Linear(256, 128))
    model = model.to("cuda", torch.float16).requires_grad_(False)
    compiled = torch.compile(model, backend="llmint8", fullgraph=True)
    for M in (1, 8, 64):
        static = torch.ones(M, 256, device="cuda", dtype=torch.float16)
        for _ in range(3):
            compiled(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compiled(static)
        for seed in range(3):
            x = torch.randn(M, 256, generator=torch.Generator().manual_seed(seed))
            x[:, seed::50] *= 20
            static.copy_(x)
            graph.replay()
            replayed = y.clone()
            assert torch.equal(replayed, compiled(static))
