"""Which linears, and with what in them: Llama-3-8B's, and a grid of cases that are awkward."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

THRESHOLD = 6.0
OUTLIERS = 32
EPS = 1e-5
WAYS = ("column", "token")


@dataclass(frozen=True)
class Layer:
    """Linears that read one activation: their widths N, and its K."""

    name: str
    widths: tuple[int, ...]
    K: int

    @property
    def N(self) -> int:
        return sum(self.widths)


LAYERS = (
    Layer("q/k/v", (4096, 1024, 1024), 4096),
    Layer("o", (4096,), 4096),
    Layer("gate/up", (14336, 14336), 4096),
    Layer("down", (4096,), 14336),
)


@dataclass(frozen=True)
class Case:
    """One linear, or a few, that is compared with the reference."""

    M: int
    widths: tuple[int, ...]
    K: int
    dtype: str
    way: str
    threshold: float
    bias: bool
    norm: str


@dataclass(frozen=True)
class Cases:
    """A grid of shapes; everything else takes turns along it, so that each meets each."""

    rows: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]

    def __iter__(self) -> Iterator[Case]:
        dtypes = ("float16", "bfloat16", "float32")
        thresholds = (THRESHOLD, 0.0, float("inf"), 1e-3)
        norms = ("", "rms", "layer, bias", "rms, rounded", "layer")
        for i, (M, widths, K) in enumerate(itertools.product(self.rows, self.widths, self.depths)):
            threshold = thresholds[i // 5 % 4] if i % 4 == 0 else THRESHOLD
            way, norm = WAYS[i // 3 % 2], norms[i % 5] if threshold else ""
            yield Case(M, widths, K, dtypes[i % 3], way, threshold, i % 2 == 0, norm)


CASES = Cases(
    rows=(1, 2, 9, 16, 17, 40, 65, 130, 300, 1030, 1536, 2999),
    widths=((80,), (81,), (82,), (3,), (96, 64, 31), (4096,), (32001,)),
    depths=(64, 96, 1000, 4096),
)


def operands(torch: Any, widths: tuple[int, ...], K: int, dtype: Any, bias: bool = False) -> tuple:
    """Packed weights, their scales, and biases or none."""
    from int8fx.kernels.ops.quantize_reference import quantize_weight

    packed = [quantize_weight(torch.randn(N, K, dtype=dtype) * K**-0.5) for N in widths]
    biases = [torch.randn(N, dtype=dtype) for N in widths] if bias else []
    return [w_int8 for w_int8, _ in packed], [w_scale for _, w_scale in packed], biases


def activation(torch: Any, M: int, K: int, dtype: Any) -> Any:
    """``[M, K]``, with outliers in up to OUTLIERS columns."""
    x = torch.randn(M, K, dtype=dtype).clamp(-5, 5)
    x[:, torch.randperm(K)[: min(OUTLIERS, max(1, K // 8))]] *= 20
    return x
