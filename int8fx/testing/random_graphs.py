"""Random small models for fuzzing: a list of steps that a module carries out, drawn by hypothesis.

A model keeps a pool of activations, all ``[B, S, width]``. A step takes one or two of them and makes
another; weights are shared now and then, as are spellings of one weight. Some steps write: to a weight,
to what shares its memory, or to an activation of the pool.
"""

import copy
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
        draw(st.sampled_from([1, 2, 3] * 4 + [0])),
        draw(st.sampled_from([1, 2, 3, 4, 5] * 3 + [0])),
        draw(st.sampled_from(WIDTHS)),
    )
    autocast = draw(st.sampled_from(["none"] * 4 + ["all", "every other step"]))
    names = sorted(STEPS if autocast == "none" else STEPS.keys() - NOT_UNDER_AUTOCAST)
    steps, widths = [], [width]
    for _ in range(draw(st.integers(1, 6))):
        source = draw(st.integers(0, len(widths) - 1))
        name = draw(st.sampled_from(names))
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
        "autocast": autocast,
    }


Weight = Callable[..., Tensor]
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


def _expanded_weight(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return x @ weight(N, x.shape[-1]).t().expand(x.shape[0], -1, -1)


def _batch_of_one(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return x[:1] @ weight(N, x.shape[-1]).t().expand(x.shape[0], -1, -1)


def _expanded_from_the_left(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    return (weight(N, x.shape[-1]).expand(x.shape[0], -1, -1) @ x.mT).mT


def _unsqueezed_weight(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    y = x.reshape(-1, x.shape[-1]) @ weight(N, x.shape[-1]).t().unsqueeze(0)
    return y.view(*x.shape[:-1], N)


def _of_a_vector(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    y = torch.mv(w, x.mean((0, 1)).to(w.dtype))
    return y.repeat(*x.shape[:-1], 1)  # a later step may write to it, so nothing is expanded


def _tensordot(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    return torch.tensordot(x.to(w.dtype), w, ([2], [1]))


def _inner(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    return torch.inner(x.to(w.dtype), w)


def _multi_dot(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    y = torch.linalg.multi_dot([x.reshape(-1, x.shape[-1]).to(w.dtype), w.t()])
    return y.view(*x.shape[:-1], N)


def _convolution(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w, bias = weight(N, x.shape[-1]), weight(1, N)[0]
    if x.shape[1] == 0:  # torch convolves nothing that is empty but for its batch
        return F.linear(x, w, bias)
    return F.conv2d(x.mT.unsqueeze(-1), w[:, :, None, None], bias).squeeze(-1).mT


def _addmm_of_a_column(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.addmm(weight(flat.shape[0], 1), flat, weight(N, x.shape[-1]).t())
    return y.view(*x.shape[:-1], N)


def _learned_queries(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    tokens = weight(x.shape[1], x.shape[-1])
    return F.linear(tokens.expand(x.shape[0], -1, -1), weight(N, x.shape[-1]))


def _written_into_out(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    y = w.new_full((*x.shape[:-1], N), 7.0)
    torch.matmul(x.to(w.dtype), w.t(), out=y)
    return y


def _mapped(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    if x.shape[0] == 0:  # torch maps over nothing that is empty
        return F.linear(x, w)
    return torch.func.vmap(lambda rows: F.linear(rows, w))(x)


def _differentiated(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    gradient = torch.func.grad(lambda value: F.linear(value, w).float().square().sum())(x)
    return F.linear(gradient / (1 + gradient.abs().amax() if gradient.numel() else 1), w)


def _pushed_forward(x: Tensor, other: Tensor, N: int, weight: Weight) -> Tensor:
    w = weight(N, x.shape[-1])
    return torch.func.jvp(lambda value: F.linear(value, w), (x,), (other.to(x.dtype),))[1]


# What repeats its weight or its result, and spellings beside the linear's own.
BROADCASTING: dict[str, Step] = {
    "expanded weight": _expanded_weight,
    "batch of one": _batch_of_one,
    "expanded w @ x": _expanded_from_the_left,
    "unsqueezed weight": _unsqueezed_weight,
    "mv": _of_a_vector,
    "tensordot": _tensordot,
    "inner": _inner,
    "multi_dot": _multi_dot,
    "convolution of one point": _convolution,
    "addmm of a column": _addmm_of_a_column,
    "learned queries": _learned_queries,
}
# Candidates that stay in float, with the reason.
REFUSED: dict[str, tuple[Step, str]] = {
    "out=": (_written_into_out, "it writes its result into out="),
    "vmap": (_mapped, "inside torch.func: vmap"),
    "grad": (_differentiated, "inside torch.func: grad"),
    "jvp": (_pushed_forward, "inside torch.func: jvp"),
}


def _into_a_weight(write: Callable[[Tensor], Any]) -> Step:
    """A linear before and one after the write; a weight of one step may be one of another, too."""

    def step(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
        w = weight(N, x.shape[-1])
        before = F.linear(x, w)
        write(w)
        return before + F.linear(x, w)

    return step


def _overlapping(x: Tensor, _: Tensor, N: int, weight: Weight) -> Tensor:
    other = weight(N, x.shape[-1], again=True)
    other.diagonal().mul_(0.5)
    return F.linear(x, weight(N, x.shape[-1]))


def _into_an_activation(write: Callable[[Tensor], Any]) -> Step:
    """Of the pool: whatever reads it later reads what is written, and what read it before does not."""

    def step(x: Tensor, other: Tensor, _: int, weight: Weight) -> Tensor:
        w = weight(x.shape[-1], x.shape[-1])
        before = F.linear(x, w)
        write(x)
        return before + F.linear(x, w)

    return step


# A linear whose weight is one of these stays in float.
WRITING_WEIGHTS: dict[str, Step] = {
    "w.mul_": _into_a_weight(lambda w: w.mul_(0.5)),
    "w.data": _into_a_weight(lambda w: w.data.clamp_(-0.5, 0.5)),
    "foreach on w": _into_a_weight(lambda w: torch._foreach_mul_([w], 0.5)),
    "w, positional": _into_a_weight(lambda w: F.leaky_relu(w, 0.1, True)),
    "w through views": _into_a_weight(lambda w: w.tensor_split(2)[0].adjoint().mul_(0.5)),
    "overlapping weights": _overlapping,
}
WRITING_ACTIVATIONS: dict[str, Step] = {
    "x, positional": _into_an_activation(lambda x: F.leaky_relu(x, 0.1, True)),
    "x through views": _into_an_activation(lambda x: F.relu(x.diagonal(0, 0, 2), True)),
    "foreach on x": _into_an_activation(lambda x: torch._foreach_mul_([x], 0.5)),
    "x.data": _into_an_activation(lambda x: x.data.clamp_(-1, 1)),
}
MUTATING = WRITING_WEIGHTS | WRITING_ACTIVATIONS

STEPS: dict[str, Step] = MUTATING | {
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
    "outlier": lambda x, other, N, weight: torch.where(x == x.amax(), x * 20, x) if x.numel() else x,
    "reshape": lambda x, other, N, weight: x.reshape(-1, x.shape[-1]).view(x.shape),
    "reversed tokens": lambda x, other, N, weight: x.flip(1),
    "slice": lambda x, other, N, weight: torch.cat([x[:, 1:], x[:, :1]], 1),
    "transpose": lambda x, other, N, weight: x.mT.contiguous().mT,
    **BROADCASTING,
    **{name: step for name, (step, _) in REFUSED.items()},
}
LINEARS = (
    BROADCASTING.keys()
    | WRITING_WEIGHTS.keys()
    | set(
        "linear, linear with bias, matmul, addmm, w @ x, einsum, slice of a weight, experts".split(", ")
    )
)
CHANGES_WIDTH = LINEARS | REFUSED.keys()
# Which element is the largest may depend on how the operators before it round.
NOT_UNDER_AUTOCAST = frozenset({"outlier"})


class RandomModel(nn.Module):
    """Carries out a program; answers with the last activation.

    A call may write to the model's weights and to its input: ``reset`` before another one.
    """

    def __init__(self, program: dict[str, Any]) -> None:
        super().__init__()
        self.steps, self.autocast = program["steps"], program.get("autocast", "none")
        self.weights = nn.ParameterDict()
        self.generator = torch.Generator().manual_seed(program["seed"])
        self.dtype = getattr(torch, program["dtype"])
        self.x = torch.randn(program["shape"], generator=self.generator).to(self.dtype)
        with torch.no_grad():
            self(self.x.clone())  # makes the weights
        self.requires_grad_(False)
        self.beginning = copy.deepcopy(self.state_dict())

    def reset(self) -> None:
        """Gives the weights the values that they had."""
        self.load_state_dict(self.beginning)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast == "all"):
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        pool = [x]
        for number, (name, source, partner, target, shared) in enumerate(self.steps):
            # Steps with one number for ``shared`` read one weight, where its shape fits.
            key = f"{shared or f'own{number}'}"
            weight = self._weights(key)
            if self.autocast == "every other step" and number % 2 == 0:
                with torch.autocast("cpu", torch.bfloat16):
                    y = STEPS[name](pool[source], pool[partner], target, weight)
                pool.append(y.to(self.dtype))
            else:
                pool.append(STEPS[name](pool[source], pool[partner], target, weight))
        return pool[-1]

    def _weights(self, key: str) -> Weight:
        def weight(rows: int, columns: int, again: bool = False) -> Tensor:
            """``again``: another parameter in the memory of this one."""
            name = f"{key}_{rows}_{columns}"
            if name not in self.weights:
                value = torch.randn(rows, columns, generator=self.generator) * columns**-0.5
                self.weights[name] = nn.Parameter(value.to(self.dtype))
            if again and f"{name}_again" not in self.weights:
                self.weights[f"{name}_again"] = nn.Parameter(self.weights[name].data)
            return self.weights[f"{name}_again" if again else name]

        return weight
