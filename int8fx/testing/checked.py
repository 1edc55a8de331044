"""A model under llmint8 with every int8 linear checked while it runs, and without Inductor.

What surrounds a linear in a whole model amplifies rounding (DESIGN, section 8), so outputs of whole
models say little; the derived bound (``bounds.py``) holds for each linear alone. ``checking()`` runs
the rewritten graph as it is, call by call, and compares each ``int8fx`` call with the float64 product
of the same input and the *float* weight::

    with checking() as seen:
        y = torch.compile(model, backend="llmint8")(x)
    assert seen.worst <= 1

With ``checking(exact=True)`` each of these calls then answers with the float64 product. What is left of
the difference to the float model is what the passes did to the graph around the linears: nothing, but
for rounding. With ``checking(inductor=True)`` the same is done to the calls that Inductor's code makes,
and what is left is what the passes and Inductor did.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from int8fx import torch_private
from int8fx.compiler import pipeline
from int8fx.compiler.compilation import Compilation
from int8fx.kernels.formats.format import WeightFormat
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.attention import attention, attention_reference
from int8fx.kernels.ops.expert_linear import expert_linear
from int8fx.kernels.ops.once import once
from int8fx.passes.graph.flops import flops
from int8fx.passes.graph.weight_expression import WeightExpression
from int8fx.passes.linears.canonicalize import Candidate
from int8fx.passes.linears.decision import Decision
from int8fx.testing.bounds import attention_bound, expected_and_bound
from int8fx.weights.store import STORE, PackedWeight


@dataclass
class Seen:
    """What ran, and how near it came to the bound.

    Attributes:
        worst: the largest ratio of an error to its bound; at most 1 when all is well.
        linears: how many products were compared.
        flops: of each decision, multiplications and additions of one call; None if not known.
        graphs: how many graphs Dynamo made.
    """

    worst: float = 0.0
    worst_call: str = ""
    linears: int = 0
    graphs: int = 0
    flops: list[tuple[Decision, int | None]] = field(default_factory=list)
    weights: dict[int, Tensor] = field(default_factory=dict)
    exact: bool = False

    def record(self, what: str, y: Tensor, expected: Tensor, bound: Tensor) -> Tensor:
        """Compares; returns what the call answers with."""
        self.linears += 1
        finite = expected.isfinite() & bound.isfinite()
        # A non-finite result must not come out as a wrong finite number.
        if (y.isfinite() & ~expected.isfinite()).any():
            self.worst, self.worst_call = math.inf, f"{what}: finite where float is not"
        error = ((y.double() - expected).abs() / bound)[finite]
        ratio = 0.0 if error.numel() == 0 else float(error.nan_to_num(math.inf).max())
        if ratio > self.worst:
            self.worst, self.worst_call = ratio, what
        return expected.to(y.dtype) if self.exact else y

    @property
    def share(self) -> float | None:
        """The share of the matmuls' operations that is in int8; None without any."""
        total = sum(flops or 0 for _, flops in self.flops)
        done = sum(flops or 0 for decision, flops in self.flops if decision.accepted)
        return done / total if total else None


def _check_linears(seen: Seen, args: Sequence[Any], outputs: Sequence[Tensor]) -> list[Tensor]:
    x, threshold, decomposition, weights, _, biases = args
    answers = []
    for index, (packed, y) in enumerate(zip(weights, outputs, strict=True)):
        weight = seen.weights[packed.data_ptr()]
        bias = biases[index] if biases else None
        expected, bound = expected_and_bound(x, weight, bias, threshold, decomposition)
        what = f"[N={weight.shape[0]}, K={weight.shape[1]}]"
        answers.append(seen.record(what, y, expected, bound))
    return answers


def _check_experts(seen: Seen, args: Sequence[Any], y: Tensor) -> Tensor:
    x, threshold, decomposition, packed, _, experts, *ends = args
    if experts is None:
        experts = torch.searchsorted(ends[0], torch.arange(len(x)), right=True)
    weight = seen.weights[packed.data_ptr()]
    answer = y.clone()
    E, N, K = weight.shape
    for expert in range(E):
        rows = (experts == expert) | (experts == expert - E)
        expected, bound = expected_and_bound(x[rows], weight[expert], None, threshold, decomposition)
        answer[rows] = seen.record(f"expert [N={N}, K={K}]", y[rows], expected, bound)
    assert not y[experts == E].any()
    return answer


def _check_attention(seen: Seen, args: Sequence[Any], y: Tensor) -> Tensor:
    """It is in float: no linear is counted, and the answer stays."""
    q, k, v, mask, is_causal, scale = args
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = attention_reference(q.double(), k.double(), v.double(), wide, is_causal, scale)
    finite = expected.isfinite()
    assert (y.isfinite() == finite).all()
    if finite.all() and y.numel():
        assert (y.double() - expected).abs().max() <= attention_bound(q, k, v, scale)
    return y


def _check_once(seen: Seen, args: Sequence[Any], y: Tensor) -> Tensor:
    assert torch.equal(y, args[0])
    return y


CHECKS: dict[Any, Callable[[Seen, Sequence[Any], Any], Any]] = {
    ops.int8_linears: _check_linears,
    expert_linear: _check_experts,
    attention: _check_attention,
    once: _check_once,
}


class _Checking(TorchDispatchMode):
    # A body that repeats comes as one call (``passes/graph/outline.py``). What is in it is checked.
    supports_higher_order_operators = True

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch_private.subgraph_call():
            body, _, *operands = args
            with self:
                return body(*operands)
        result = func(*args, **(kwargs or {}))
        if func in CHECKS:
            return CHECKS[func](self.seen, args, result)
        if func.namespace == "int8fx":
            raise AssertionError(f"nothing here checks {func}")
        return result


@contextlib.contextmanager
def checking(exact: bool = False, inductor: bool = False) -> Iterator[Seen]:
    """Every int8 linear of models compiled in the ``with`` block is checked.

    Args:
        exact: answer with the float64 products.
        inductor: compile what is interpreted otherwise.
    """
    seen = Seen(exact=exact)

    def checked(gm: fx.GraphModule, *rest: Any) -> Callable[..., Any]:
        seen.graphs += 1
        graph = compile_with_inductor(gm, *rest) if inductor else gm

        def run(*args: Any) -> Any:
            with _Checking(seen):
                return graph(*args)

        return run

    def get(tensor: Tensor, expression: WeightExpression, weight_format: WeightFormat) -> PackedWeight:
        packed = original_get(tensor, expression, weight_format)
        seen.weights[packed.tensors[0].data_ptr()] = expression.evaluate(tensor.detach())
        return packed

    def select(compilation: Compilation) -> None:
        original_select(compilation)
        pairs = zip(compilation.found, compilation.decisions, strict=True)
        for candidate, decision in pairs:
            seen.flops.append((decision, operations(candidate, decision, compilation)))

    original_get, original_select = STORE.get, pipeline.select
    compile_with_inductor = torch_private.compile_with_inductor
    below_autograd = torch_private.below_autograd if inductor else lambda compiled: compiled
    with (
        # Composite operators, which only what is interpreted has, would come whole, past autocast.
        mock.patch.object(torch_private, "below_autograd", below_autograd),
        mock.patch.object(torch_private, "compile_with_inductor", checked),
        mock.patch.object(STORE, "get", get),
        mock.patch.object(pipeline, "select", select),
    ):
        yield seen


def operations(candidate: Candidate, decision: Decision, compilation: Compilation) -> int | None:
    """Multiplications and additions of one linear or matmul of Dynamo's graph, if they are known."""
    y = candidate.node.meta.get("example_value")
    if decision.shape is not None and isinstance(y, Tensor):
        size = 2 * y.numel() * decision.shape[1]
        return size if isinstance(size, int) else None
    return flops(candidate.node, compilation.fake_mode, FlopCounterMode(display=False))
