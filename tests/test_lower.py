"""lower: what an accepted candidate becomes in the graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8fx.kernels.ops import int8_linear as ops
from int8fx.testing.support import assert_close_to_float64, compile_once, outcome_of

K, N = 16, 24


@pytest.fixture
def x():
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1))


def code(graph: str) -> str:
    """The printed graph without the comments that quote the model's source."""
    return "\n".join(line for line in graph.splitlines() if "# File:" not in line)


def test_the_rewritten_graph_reads_as_documented(x):
    _, report = compile_once(nn.Linear(K, N), x)
    assert "torch._C._nn.linear(" in report.original
    assert "torch._C._nn.linear(" not in report.graph
    assert "torch.ops.int8fx.int8_linears.default(l_args_0_, 6.0, 'column', [" in report.graph
    assert "weight_0_int8" in report.graph
    assert "parameters_weight_:" not in report.graph


def test_an_unused_view_of_a_weight_leaves_the_graph(x):
    weight = nn.Parameter(torch.randn(K, N), requires_grad=False)

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return F.linear(x, self.weight.t().contiguous())

    _, report = compile_once(Transposed(), x)
    assert ".t()" in code(report.original)
    assert ".t()" not in code(report.graph)


def test_ops_are_the_ones_the_docs_name():
    assert str(ops.quantize) == "int8fx.quantize.default"
    assert str(ops.int8_linear) == "int8fx.int8_linear.default"


def lowered(function, x: Tensor, **options) -> tuple[Tensor, str, int]:
    """The output of a function of a weight ``[N, K]``, the printed graph, and how many were lowered."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(K, N).requires_grad_(False)

        def forward(self, x):
            return function(x, self.linear.weight, self.linear.bias)

    y, report = compile_once(Model(), x, backend_options=options)
    outcome = outcome_of(report, "lower")
    assert outcome.refused == {}
    return y, code(report.graph), outcome.changed


def reference(function, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    linear = nn.Linear(K, N).double()
    return function(x.double(), linear.weight, linear.bias)


@pytest.mark.parametrize(
    ("function", "written"),
    [
        (lambda x, w, b: F.linear(x, w, b), ()),
        (lambda x, w, b: torch.addmm(b, x, w.t()), ()),
        (lambda x, w, b: w @ x.t(), (".transpose(-2, -1)",)),
        (lambda x, w, b: torch.addmm(x[:, :1], x, w.t()), ("torch.add(",)),
    ],
    ids=["linear", "addmm", "from the left", "addend"],
)
def test_what_is_around_the_product(x, function, written):
    y, graph, changed = lowered(function, x)
    assert changed == 1
    assert all(each in graph for each in written)
    assert_close_to_float64(y, reference(function, x), K)


def test_an_operand_that_was_lowered_itself(x):
    def twice(x, w, b):
        return F.linear(F.linear(x, w, b), w.t())

    y, graph, changed = lowered(twice, x)
    assert changed == graph.count("int8_linears.default(") == 2
    assert_close_to_float64(y, reference(twice, x), K)


def test_a_product_of_two_activations(x):
    def square(x, w, b):
        y = F.linear(x, w, b)
        return y @ y.t()

    y, graph, changed = lowered(square, x, attention=True)
    assert changed == 2 and "int8fx.int8_matmul.default(" in graph
    assert_close_to_float64(y, reference(square, x), N)


def test_autocast_becomes_casts(x):
    def cast(x, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w, b)

    y, graph, _ = lowered(cast, x)
    assert y.dtype == torch.bfloat16
    assert ".to(torch.bfloat16)" in graph


def test_a_result_lies_in_memory_as_eagers_does(x):
    def convolution(x, w, b):
        return F.conv2d(x.t().reshape(1, K, 1, 3), w[:, :, None, None], b)

    y, graph, changed = lowered(convolution, x)
    assert changed == 1 and ".contiguous()" in graph
    expected = reference(convolution, x)
    assert y.stride() == expected.stride()
    assert_close_to_float64(y, expected, K)
