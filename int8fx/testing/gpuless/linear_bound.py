"""One compiled linear against float64, within the bound that follows from the scheme."""

import math

import torch

import int8fx
from int8fx.testing.bounds import expected_and_bound

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# M for each way to the result, see kernels/gpu/linear.py; no outliers, and nothing but outliers.
CASES = [
    (1, FP16, "column", 6.0),
    (9, FP16, "column", 6.0),
    (9, BF16, "token", 6.0),
    (3, FP32, "token", 6.0),
    (40, FP16, "column", 6.0),
    (40, BF16, "token", 6.0),
    (20, FP32, "column", 6.0),
    (8, FP16, "column", math.inf),
    (8, FP16, "column", 1e-3),
    (33, FP16, "column", 1e-3),
    (33, FP16, "column", 0.0),
]
K = 96


def assert_within_the_derived_bound(
    M: int,
    dtype: torch.dtype,
    decomposition: str,
    threshold: float,
    device: torch.device,
    N: int = 80,
) -> None:
    """Compiles and runs one linear, whose input has outliers in three columns.

    Raises:
        AssertionError: it was not rewritten, or an element is further from float64 than it may be.
    """
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(M)
    linear = torch.nn.Linear(K, N)
    linear.weight.data.normal_(generator=generator)
    linear.bias.data.normal_(generator=generator)
    x = torch.randn(M, K, generator=generator)
    x[:, [5, 40, 41]] *= 15.0
    linear, x = linear.to(device, dtype).requires_grad_(False), x.to(device, dtype)
    options = {"decomposition": decomposition, "threshold": threshold}
    compiled = torch.compile(linear, backend="llmint8", options=options, fullgraph=True)
    with torch.no_grad(), int8fx.collect_reports() as reports:
        y = compiled(x)
    assert len(reports[0].accepted) == 1
    expected, bound = expected_and_bound(x, linear.weight, linear.bias, threshold, decomposition)
    assert ((y.double() - expected).abs() <= bound).all()
