"""Random calls of every spelling of a linear map: shapes that broadcast, repeat or are empty.

``GENERATORS`` has one function for each spelling of ``passes/linears/canonicalize.py``; a call's
operands are
activations, or parameters that may be transposed or repeated before they are used.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from int8fx.passes.linears.canonicalize import SPELLINGS

Draw = Callable[..., Any]
SIZES = (16, 24, 3, 1, 24, 16, 8, 0)
FEW = (2, 3, 1, 0)


@dataclass(frozen=True)
class Operand:
    """``shape`` of an activation or a parameter; ``expanded`` to another one, or ``turned`` over."""

    shape: tuple[int, ...]
    weight: bool
    expanded: tuple[int, ...] | None = None
    turned: bool = False
    dtype: torch.dtype | None = None

    def seen(self, value: Tensor) -> Tensor:
        if self.turned:
            value = value.transpose(-2, -1)
        return value if self.expanded is None else value.expand(self.expanded)


@dataclass(frozen=True)
class RandomCall:
    """One call of a spelling: operands among its arguments, in tuples or lists as well."""

    arguments: tuple
    keywords: dict[str, Any] = field(default_factory=dict)


def operand(draw: Draw, shape: tuple[int, ...], weight: bool) -> Operand:
    """Of that shape once it is seen; where it has a batch, now and then one matrix of it, repeated."""
    base, expanded = shape, None
    if len(shape) > 2 and draw(st.booleans()):
        base, expanded = shape[-2:], shape
    turned = len(base) > 1 and draw(st.booleans())
    if turned:
        base = (*base[:-2], base[-1], base[-2])
    return Operand(base, weight, expanded, turned)


def size(draw: Draw) -> int:
    return draw(st.sampled_from(SIZES))


def batch(draw: Draw, most: int = 2) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.sampled_from(FEW), max_size=most)))


def part_of(draw: Draw, whole: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to a whole one."""
    suffix = whole[draw(st.integers(0, len(whole))) :]
    return tuple(1 if draw(st.booleans()) else each for each in suffix)


def weights(draw: Draw) -> tuple[bool, bool]:
    """Which of two operands are parameters; one of them, but for a few calls."""
    return draw(
        st.sampled_from([(False, True)] * 4 + [(True, False)] * 3 + [(True, True), (False,) * 2])
    )


def of_matmul(draw: Draw) -> RandomCall:
    M, K, N = size(draw), size(draw), size(draw)
    whole = batch(draw)
    left, right = (*part_of(draw, whole), M, K), (*part_of(draw, whole), K, N)
    left = (K,) if draw(st.integers(0, 5)) == 0 else left
    right = (K,) if draw(st.integers(0, 5)) == 0 else right
    are = weights(draw)
    return RandomCall((operand(draw, left, are[0]), operand(draw, right, are[1])))


def of_mm(draw: Draw, lead: tuple[int, ...] = ()) -> RandomCall:
    M, K, N = size(draw), size(draw), size(draw)
    are = weights(draw)
    return RandomCall((operand(draw, (*lead, M, K), are[0]), operand(draw, (*lead, K, N), are[1])))


def of_bmm(draw: Draw) -> RandomCall:
    return of_mm(draw, (draw(st.sampled_from(FEW)),))


def of_mv(draw: Draw) -> RandomCall:
    N, K = size(draw), size(draw)
    are = weights(draw)
    return RandomCall((operand(draw, (N, K), are[0]), operand(draw, (K,), are[1])))


def of_addmv(draw: Draw) -> RandomCall:
    matrix, vector = of_mv(draw).arguments
    addend = Operand(draw(st.sampled_from([matrix.shape[:1], (1,), ()])), draw(st.booleans()))
    return RandomCall((addend, matrix, vector))


def of_linear(draw: Draw) -> RandomCall:
    K, N = size(draw), size(draw)
    x = operand(draw, (*batch(draw), K), draw(st.integers(0, 4)) == 0)
    weight = operand(draw, draw(st.sampled_from([(N, K)] * 5 + [(K,)])), draw(st.integers(0, 4)) != 0)
    shapes = [None, (N,), (N,), (1,), (1, N), ()]
    bias = draw(st.sampled_from(shapes))
    return RandomCall((x, weight, None if bias is None else Operand(bias, draw(st.booleans()))))


def _added(draw: Draw, product: RandomCall, whole: tuple[int, ...]) -> RandomCall:
    """With an addend that broadcasts to the result, and now and then scales."""
    N = whole[-1]
    addend = draw(st.sampled_from([(N,), (), (1,), (1, N), (whole[-2], 1), whole]))
    keywords = draw(
        st.sampled_from([{}] * 6 + [{"beta": 1, "alpha": 1.0}, {"beta": 2}, {"alpha": 0.5}])
    )
    return RandomCall((Operand(addend, draw(st.booleans())), *product.arguments), keywords)


def _result(product: RandomCall) -> tuple[int, ...]:
    left, right = (each.expanded or each.shape for each in product.arguments)
    turned = [each.turned and each.expanded is None for each in product.arguments]
    return (*left[:-2], left[-1] if turned[0] else left[-2], right[-2] if turned[1] else right[-1])


def of_addmm(draw: Draw) -> RandomCall:
    product = of_mm(draw)
    return _added(draw, product, _result(product))


def of_baddbmm(draw: Draw) -> RandomCall:
    product = of_bmm(draw)
    return _added(draw, product, _result(product))


def of_addbmm(draw: Draw) -> RandomCall:
    product = of_bmm(draw)
    return _added(draw, product, _result(product)[1:])


EQUATIONS = (
    "bk,kn->bn",
    "bsk,kn->bsn",
    "...k,nk->...n",
    "nk,bsk->bsn",
    "bsk,hkd->bhsd",
    "bshd,hdn->bsn",
    "sk,kt",
    "ij,jk->ki",
    "bk,bkn->bn",
    "bk,n->bn",
)


def of_einsum(draw: Draw) -> RandomCall:
    equation = draw(st.sampled_from(EQUATIONS))
    sizes = {letter: draw(st.sampled_from((*FEW, 16))) for letter in "bhdijkmnst"}
    shapes = []
    for letters in equation.split("->")[0].split(","):
        lead = batch(draw) if "..." in letters else ()
        one = draw(st.sampled_from([None, None, *letters.strip(".")]))
        shapes.append(
            (*lead, *(1 if letter == one else sizes[letter] for letter in letters.strip(".")))
        )
    # The transposed or repeated ones are matmul's to try.
    are = weights(draw)
    return RandomCall(
        (equation, *(Operand(shape, is_) for shape, is_ in zip(shapes, are, strict=True)))
    )


def of_tensordot(draw: Draw) -> RandomCall:
    shared = tuple(size(draw) for _ in range(draw(st.sampled_from([1, 1, 2, 0]))))
    left, right = batch(draw), (*batch(draw, 1), size(draw))
    are = weights(draw)
    count = len(shared)
    one = tuple(1 if draw(st.integers(0, 5)) == 0 else each for each in shared)
    operands = Operand((*left, *shared), are[0]), Operand((*one, *right), are[1])
    lists = [list(range(-count, 0)), list(range(count))]
    return RandomCall(operands, {"dims": draw(st.sampled_from([count, lists]))})


def of_inner(draw: Draw) -> RandomCall:
    K, are = size(draw), weights(draw)
    shapes = (*batch(draw), K), (*batch(draw), K)
    return RandomCall(tuple(Operand(shape, is_) for shape, is_ in zip(shapes, are, strict=True)))


def of_multi_dot(draw: Draw) -> RandomCall:
    product = of_mm(draw).arguments
    if draw(st.integers(0, 4)) == 0:
        last = _result(RandomCall(product))[-1]
        product = (*product, Operand((last, 3), True))
    return RandomCall((product,))


def of_chain_matmul(draw: Draw) -> RandomCall:
    return RandomCall(*of_multi_dot(draw).arguments)


def of_convolution(draw: Draw, dimensions: int) -> RandomCall:
    K, N = (draw(st.sampled_from((16, 24, 3, 1))) for _ in range(2))
    lead = draw(st.sampled_from([(), (2,), (1,), (0,)]))
    image = tuple(draw(st.sampled_from([4, 3, 1])) for _ in range(dimensions))
    kernel = draw(st.sampled_from([1, 1, 1, 1, 3]))
    groups = draw(st.sampled_from([1, 1, 1, K]))
    x = Operand((*lead, K, *image), False)
    weight = Operand((N * groups, K // groups, *[kernel] * dimensions), draw(st.integers(0, 4)) != 0)
    bias = draw(st.sampled_from([None, Operand((N * groups,), True)]))
    # As lists, for operators of aten take no single number.
    stride, dilation = ([draw(st.sampled_from([1, 1, 1, 2]))] * dimensions for _ in range(2))
    padding = draw(st.sampled_from([[0] * dimensions, "same", "valid", [1] * dimensions]))
    return RandomCall((x, weight, bias, stride, padding, dilation, groups))


def of_grouped_mm(draw: Draw) -> RandomCall:
    rows = draw(st.lists(st.sampled_from((3, 1, 0)), min_size=2, max_size=3))
    K, N = draw(st.sampled_from((16, 24))), draw(st.sampled_from((16, 24)))
    weight = Operand((len(rows), K, N), draw(st.integers(0, 4)) != 0)
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    return RandomCall((Operand((sum(rows), K), False), weight), {"offs": ends})


# By the last part of the spelling's name.
GENERATORS: dict[str, Callable[[Draw], RandomCall]] = {
    "linear": of_linear,
    "matmul": of_matmul,
    "@": of_matmul,
    "@=": of_matmul,
    "mm": of_mm,
    "bmm": of_bmm,
    "addmm": of_addmm,
    "baddbmm": of_baddbmm,
    "addbmm": of_addbmm,
    "mv": of_mv,
    "addmv": of_addmv,
    "inner": of_inner,
    "tensordot": of_tensordot,
    "multi_dot": of_multi_dot,
    "linalg_multi_dot": of_multi_dot,
    "chain_matmul": of_chain_matmul,
    "conv1d": functools.partial(of_convolution, dimensions=1),
    "conv2d": functools.partial(of_convolution, dimensions=2),
    "conv3d": functools.partial(of_convolution, dimensions=3),
    "einsum": of_einsum,
    "grouped_mm": of_grouped_mm,
    "grouped_mm_fallback": of_grouped_mm,
}


def generator(key: Any) -> Callable[[Draw], RandomCall]:
    return GENERATORS[SPELLINGS[key][0].rpartition(".")[2]]


def function(key: Any) -> Callable[..., Any]:
    """What a row of ``SPELLINGS`` is called with, as a function."""
    if key == "__rmatmul__":
        return lambda left, right: right.__rmatmul__(left)
    if isinstance(key, str) and "." in key:
        return operator.attrgetter(key)(torch.ops)
    if isinstance(key, str):
        return lambda value, *rest, **named: getattr(value, key)(*rest, **named)
    return key


class Spelled(nn.Module):
    """One call, whose parameters are the module's and whose activations come as ``activations``."""

    def __init__(self, key: Any, call: RandomCall, dtype: torch.dtype, autocast: bool) -> None:
        super().__init__()
        self.function, self.call, self.autocast = function(key), call, autocast
        generator = torch.Generator().manual_seed(0)
        self.weights, self.activations = nn.ParameterList(), []
        for each in self._operands(call.arguments):
            value = torch.randn(each.shape, generator=generator).to(dtype)
            if each.weight:
                self.weights.append(nn.Parameter(value, requires_grad=False))
            else:
                self.activations.append(value)

    def _operands(self, arguments: tuple) -> list[Operand]:
        found = []
        for each in arguments:
            if isinstance(each, tuple):
                found += self._operands(each)
            elif isinstance(each, Operand):
                found.append(each)
        return found

    def forward(self, *activations: Tensor, out: Tensor | None = None) -> Any:
        values = iter(activations), iter(self.weights)

        def fill(each: Any) -> Any:
            if isinstance(each, tuple):
                return tuple([fill(part) for part in each])
            return each.seen(next(values[each.weight])) if isinstance(each, Operand) else each

        arguments = [fill(each) for each in self.call.arguments]
        named = self.call.keywords if out is None else {**self.call.keywords, "out": out}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y = self.function(*arguments, **named)
        return y if out is None else (y, out)
