"""Random small models for fuzzing: a list of steps that a module carries out, drawn by hypothesis.

A model keeps a pool of activations, all ``[B, S, width]``. A step takes one or two of them and makes
another; weights are shared now and then, as are spellings of one weight.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTHS = (1, 3, 8, 17, 32)


@st.composite
def programs(draw: Any) -> dict[str, Any]:
    """What a ``RandomModel`` is made of: plain values, so that a counterexample prints as code."""
    batch, length, width = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(WIDTHS)),
    )
    steps, widths = [], [width]
    for _ in range(draw(st.integers(1, 6))):
        source = draw(st.integers(0, len(widths) - 1))
        name = draw(st.sampled_from(sorted(STEPS)))
        target = draw(st.sampled_from(WIDTHS)) if name in CHANGES_WIDTH else widths[source]
        shared = draw(st.integers(0, 2)) if name in CHANGES_WIDTH else 0
        partner = next(
            (i for i in range(len(widths) - 1, -1, -1) if widths[i] == widths[source] and i != source),
            source,
        )
        steps.append((name, source, partner, target, shared))
        widths.append(target)
    return {
        "shape": (batch, length, width),
        "steps": steps,
        "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        "threshold": draw(st.sampled_from([0.0, 2.0, 6.0])),
        "decomposition": draw(st.sampled_from(["column", "token"])),
        "seed": draw(st.integers(0, 2**16)),
    }


Weight = Callable[[int, int], Tensor]
Step = Callable[[Tensor, Tensor, int, Weight], Tensor]


def _linear(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return F.linear(x, weight(N, x.shape[-1]))


def _biased(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return F.linear(x, weight(N, x.shape[-1]), weight(1, N)[0])


def _matmul(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return x @ weight(N, x.shape[-1]).t()


def _addmm(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.addmm(weight(1, N)[0], flat, weight(N, x.shape[-1]).t())
    return y.view(*x.shape[:-1], N)


def _from_the_left(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return (weight(N, x.shape[-1]) @ x.mT).mT


def _einsum(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return torch.einsum("bsk,nk->bsn", x, weight(N, x.shape[-1]))


def _sliced(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return F.linear(x, weight(2 * N, x.shape[-1])[N:])


def _in_place(x: Tensor, other: Tensor, _: int, weight: Weight) -> Tensor:
    y = x.clone()
    y.add_(other)
    return y


def _experts(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    K = x.shape[-1]
    stack = weight(3 * N, K).view(3, N, K)
    rows = x.reshape(-1, K)
    experts = torch.arange(rows.shape[0], device=x.device) % 3
    y = torch.bmm(stack[experts], rows.unsqueeze(-1)).squeeze(-1)
    return y.view(*x.shape[:-1], N)


STEPS: dict[str, Step] = {
    "linear": _linear,
    "linear with bias": _biased,
    "matmul": _matmul,
    "addmm": _addmm,
    "w @ x": _from_the_left,
    "einsum": _einsum,
    "slice of a weight": _sliced,
    "experts": _experts,
    "residual": lambda x, other, N, weight: x + other,
    "in-place residual": _in_place,
    "gate": lambda x, other, N, weight: F.silu(x) * other,
    "norm": lambda x, other, N, weight: F.layer_norm(x, x.shape[-1:]),
    "outlier": lambda x, other, N, weight: torch.where(x == x.amax(), x * 20, x),
    "reshape": lambda x, other, N, weight: x.reshape(-1, x.shape[-1]).view(x.shape),
    "reversed tokens": lambda x, other, N, weight: x.flip(1),
    "slice": lambda x, other, N, weight: torch.cat([x[:, 1:], x[:, :1]], 1),
    "transpose": lambda x, other, N, weight: x.mT.contiguous().mT,
}
CHANGES_WIDTH = frozenset(
    "linear, linear with bias, matmul, addmm, w @ x, einsum, slice of a weight, experts".split(", ")
)


class RandomModel(nn.Module):
    """Carries out a program; answers with the last activation and the sum of the first."""

    def __init__(self, program: dict[str, Any]) -> None:
        super().__init__()
        self.steps = program["steps"]
        self.weights = nn.ParameterDict()
        self.generator = torch.Generator().manual_seed(program["seed"])
        self.dtype = getattr(torch, program["dtype"])
        self.x = torch.randn(program["shape"], generator=self.generator).to(self.dtype)
        with torch.no_grad():
            self(self.x)  # makes the weights
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        pool = [x]
        for number, (name, source, partner, target, shared) in enumerate(self.steps):
            # Steps with one number for ``shared`` read one weight, where its shape fits.
            key = f"{shared or f'own{number}'}"
            weight = self._weights(key)
            pool.append(STEPS[name](pool[source], pool[partner], target, weight))
        return pool[-1]

    def _weights(self, key: str) -> Weight:
        def weight(rows: int, columns: int) -> Tensor:
            name = f"{key}_{rows}_{columns}"
            if name not in self.weights:
                value = torch.randn(rows, columns, generator=self.generator) * columns**-0.5
                self.weights[name] = nn.Parameter(value.to(self.dtype))
            return self.weights[name]

        return weight
