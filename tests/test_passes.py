"""The passes on their own: what they print, how often they match, and where they hold back."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int8fx.kernels.ops import int8_linear as ops
from int8fx.passes.graph.mutation import writes_in_place
from int8fx.passes.graph.verify import RewriteError, Signature, verify
from int8fx.passes.int8.fuse_epilogue import fuse_epilogue
from int8fx.passes.linears.einsum import linear_map
from int8fx.testing.support import assert_close_to_float64, compile_once, memory_of

K, N = 16, 24


@pytest.fixture
def x():
    return torch.randn(3, K, generator=torch.Generator().manual_seed(1))


class Biased(nn.Module):
    def __init__(self, combine, bias_shape=(N,)):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(K, N), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(bias_shape), requires_grad=False)
        self.combine = combine

    def forward(self, x):
        return self.combine(x @ self.weight, self.bias)


def code(graph: str) -> str:
    """The printed graph without the comments that quote the model's source."""
    return "\n".join(line for line in graph.splitlines() if "# File:" not in line)


def adds(report) -> int:
    return code(report.graph).count(" + ") + code(report.graph).count("torch.add(")


def test_a_bias_after_a_matmul_moves_into_the_linear(x):
    model = Biased(lambda y, b: y + b)
    y, report = compile_once(model, x)
    assert adds(report) == 0
    assert_close_to_float64(y, x.double() @ model.weight.double() + model.bias.double(), K)


@pytest.mark.parametrize(
    ("combine", "shape"),
    [
        (lambda y, b: y + b, (3, N)),  # a residual
        (lambda y, b: y + b, (1,)),  # broadcast along N
        (lambda y, b: torch.add(y, b, alpha=2), (N,)),
        (lambda y, b: (y + b) * y, (N,)),  # the product without the bias is needed too
        (lambda y, b: y + b * b, (N,)),  # the bias is read elsewhere
    ],
    ids=["residual", "broadcast", "alpha", "two readers", "bias read twice"],
)
def test_what_is_no_bias_stays_where_it_is(x, combine, shape):
    model = Biased(combine, shape)
    y, report = compile_once(model, x)
    assert adds(report) == 1
    expected = combine(x.double() @ model.weight.double(), model.bias.double())
    assert_close_to_float64(y, expected, K)


def test_fuse_epilogue_counts_what_it_moved():
    graph = torch.fx.Graph()
    bias = graph.placeholder("bias")
    bias.meta["example_value"] = torch.empty(N)
    linear = graph.call_function(ops.int8_linear, (None,) * 7)
    linear.meta["example_value"] = torch.empty(3, N)
    graph.output(graph.call_function(operator.add, (linear, bias)))
    assert fuse_epilogue(graph, memory_of(graph)) == 1
    assert linear.args[6] is bias
    assert not graph.find_nodes(op="call_function", target=operator.add)
    assert fuse_epilogue(graph, memory_of(graph)) == 0


def test_the_rewritten_graph_reads_as_documented(x):
    _, report = compile_once(nn.Linear(K, N), x)
    assert "torch._C._nn.linear(" in report.original
    assert "torch._C._nn.linear(" not in report.graph
    assert "torch.ops.int8fx.quantized_linears_cpu.default(l_args_0_, 6.0, 'column', [" in report.graph
    assert "weight_0_int8" in report.graph
    assert "parameters_weight_:" not in report.graph


def test_an_unused_view_of_a_weight_leaves_the_graph(x):
    model = Biased(lambda y, b: y + b)
    model.forward = lambda x: F.linear(x, model.weight.t().contiguous())
    _, report = compile_once(model, x)
    assert ".t()" in code(report.original)
    assert ".t()" not in code(report.graph)


def test_verify_names_a_rewrite_that_changed_the_shape(x):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    before = Signature((2, 3), torch.float32, torch.device("cpu"))
    after = Signature((3, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(RewriteError, match=r"x was .*\(2, 3\).* and became .*\(3, 2\)"):
        verify(None, [(node, before, after)])


@pytest.mark.parametrize(
    ("function", "written"),
    [
        (lambda x: x.add_(1), True),
        (lambda x: x.__setitem__(0, 1), True),
        (lambda x: torch.relu(x, out=x), True),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: torch.ops.aten.add_.Tensor(x, x), True),
        (lambda x: x + 1, False),
        (lambda x: operator.and_(x, x), False),
        (lambda x: x.__add__(1), False),
        (lambda x: torch.ops.aten.add.Tensor(x, x), False),
    ],
)
def test_writes_are_recognised(function, written):
    class Call(nn.Module):
        def forward(self, x):
            return function(x)

    tracer = torch.fx.Tracer()
    tracer._autowrap_function_ids.add(id(torch.relu))
    try:
        graph = tracer.trace(Call())
    except TypeError:  # a proxy has no item assignment
        graph = torch.fx.Graph()
        node = graph.placeholder("x")
        graph.call_method("__setitem__", (node, 0, 1))
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    assert [writes_in_place(node) for node in calls] == [written]


@pytest.mark.parametrize(
    "equation",
    ["bsk,kn->bsn", "bsk,hkd->bshd", "bshd,hdn->bsn", "...k,nk->...n", "bsk,hkd->dbhs", "k,nk->n"],
)
def test_einsum_as_a_linear_map_equals_einsum(equation):
    sizes = {"b": 2, "s": 3, "k": 5, "n": 7, "h": 4, "d": 6}
    left, right = equation.split("->")[0].split(",")
    x = torch.randn([*((2, 3) if "..." in left else ()), *(sizes[i] for i in left.replace("...", ""))])
    weight = torch.randn([sizes[i] for i in right])
    form = linear_map(equation, 1, tuple(weight.shape), tuple(x.shape))
    assert not isinstance(form, str)

    def apply(value, calls):
        for name, *args in calls:
            value = getattr(value, name)(*args)
        return value

    y = apply(F.linear(apply(x, form[0]), apply(weight, form[1])), form[2])
    torch.testing.assert_close(y, torch.einsum(equation, x, weight))


def test_ops_are_the_ones_the_docs_name():
    assert str(ops.quantize) == "int8fx.quantize.default"
    assert str(ops.int8_linear) == "int8fx.int8_linear.default"
