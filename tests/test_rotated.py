"""The rotated int8 linear: every instruction set of this machine against the reference and float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import int8fx
from int8fx.calibration import CalibratedLinear, Calibration
from int8fx.kernels import table
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.formats.rotated import rotated
from int8fx.kernels.ops import rotated_linear as ops
from int8fx.kernels.ops.rotation import ROTATIONS, allowed_blocks
from int8fx.kernels.schemes.scheme import Choice
from int8fx.kernels.schemes.static_columns import operands
from int8fx.kernels.schemes.table import SCHEMES
from int8fx.testing.rotations import expected_and_bound
from int8fx.testing.support import compile_once

ISAS = [*cpu.isas(), "auto"] if cpu.load() is None else []
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
EACH = [(rotation, block) for rotation in ROTATIONS for block in allowed_blocks(rotation)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(M: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """With a column that is large in every row, and one with an outlier."""
    x = torch.randn(M, K, generator=generator(seed)) + 0.3
    x[:, K // 3] *= 40
    x[M // 2 : M // 2 + 1, K // 2] = 300
    return x.to(dtype)


def weight_of(N: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=generator(seed)).to(dtype)


def choice(columns=(), block: int = 64, rotation: str = "hadamard") -> Choice:
    return SCHEMES["int8-rotated"].choice(columns=tuple(columns), block=block, rotation=rotation)


def parts_of(weight: Tensor, columns=(), block: int = 64, rotation: str = "hadamard"):
    """What the operators take of a weight."""
    return operands(choice(columns, block, rotation).quantize(weight))


def linear(x: Tensor, weight: Tensor, bias=None, columns=(), block=64, rotation="hadamard") -> Tensor:
    parts = parts_of(weight, columns, block, rotation)
    return ops.rotated_linear(x, 0.0, block, rotation, *parts, bias)


def check(x, weight, bias=None, columns=(), block=64, rotation="hadamard") -> None:
    y = linear(x, weight, bias, columns, block, rotation)
    expected, bound = expected_and_bound(x, weight, bias, tuple(columns), block, rotation)
    assert y.dtype == x.dtype and y.shape == expected.shape
    excess = (y.double() - expected).abs() - bound
    overflows = expected.abs() + bound > torch.finfo(x.dtype).max
    infinite = overflows & y.isinf() & (y.sign() == expected.sign())
    assert ((excess <= 0) | infinite).all(), excess.max()


# --- against float64 ------------------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize(("K", "N"), [(64, 16), (576, 100), (100, 33), (1, 1), (4096, 20)])
def test_shapes_and_rows(isa, dtype, K, N):
    weight, bias = weight_of(N, K, dtype), torch.randn(N, generator=generator()).to(dtype)
    for M in (0, 1, 2, 5, 12, 13, 17, 40):
        check(rows(M, K, dtype), weight, bias, columns=(K // 3,))


@each_isa
@pytest.mark.parametrize(("rotation", "block"), EACH)
def test_rotations_and_blocks(isa, rotation, block):
    for K in (96, 300, 512):
        check(rows(7, K), weight_of(40, K), None, (K // 3,), block, rotation)


@each_isa
@each_dtype
@pytest.mark.parametrize("count", [0, 1, 8, 64])
def test_numbers_of_columns(isa, dtype, count):
    columns = sorted(torch.randperm(320, generator=generator())[:count].tolist())
    for M in (1, 3, 30):
        check(rows(M, 320, dtype), weight_of(72, 320, dtype), None, columns)


@each_isa
def test_anything_against_float64(isa):
    @settings(max_examples=40, deadline=None)
    @given(
        M=st.integers(0, 40),
        K=st.integers(1, 300),
        N=st.integers(1, 70),
        case=st.sampled_from(EACH),
        dtype=st.sampled_from(DTYPES),
        exponent=st.integers(-8, 8),
        share=st.floats(0, 0.2),
        seed=st.integers(0, 2**16),
    )
    def run(M, K, N, case, dtype, exponent, share, seed):
        rotation, block = case
        x = (rows(M, K, seed=seed) * 2.0 ** min(exponent, 6)).to(dtype)  # 2**16 is too much for fp16
        count = min(int(share * K), 64)
        columns = sorted(torch.randperm(K, generator=generator(seed))[:count].tolist())
        bias = torch.randn(N, generator=generator(seed)) if seed % 2 else None
        check(x, weight_of(N, K, seed=seed), bias, columns, block, rotation)

    run()


@each_isa
@each_dtype
def test_the_kernel_quantises_as_the_reference(isa, dtype):
    """Bit for bit: one channel picks out one rotated element after another."""
    K = 192
    x = rows(5, K, dtype)
    at = torch.tensor([7, 64], dtype=torch.int32)
    x_int8, x_scale, _, _ = ops.quantize_rotated_reference(x, at, 0.0, 64, "hadamard")
    nothing = torch.zeros(2, K, dtype=torch.float32)
    parts = table.pack(torch.eye(K, dtype=torch.int8)), torch.ones(K), nothing, at
    y = ops.rotated_linear(x.float(), 0.0, 64, "hadamard", *parts, None)
    assert torch.equal(y, x_int8.float() * x_scale.unsqueeze(1))


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_depends_on_itself_alone(isa, dtype):
    """The same bits whatever comes with it, and in whatever order."""
    x, weight = rows(41, 320, dtype), weight_of(100, 320, dtype)
    columns = (1, 77, 106, 200)
    whole = linear(x, weight, None, columns)
    for M in (1, 2, 7, 16, 33):
        assert torch.equal(linear(x[:M], weight, None, columns), whole[:M])
    order = torch.randperm(41, generator=generator())
    assert torch.equal(linear(x[order], weight, None, columns), whole[order])
    loud = torch.cat([x, rows(3, 320, dtype, seed=9) * 1000])
    assert torch.equal(linear(loud, weight, None, columns)[:41], whole)


@each_isa
def test_instruction_sets_agree(isa):
    """Integers and scales bit for bit; the sums of columns within their round-off."""
    x, weight = rows(9, 576), weight_of(64, 576)
    cpu.use_isa("portable")
    portable, kept = linear(x, weight), linear(x, weight, None, (5, 192))
    cpu.use_isa(isa)
    assert torch.equal(linear(x, weight), portable)
    torch.testing.assert_close(linear(x, weight, None, (5, 192)), kept, rtol=1e-5, atol=1e-3)


@each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, value):
    x, weight = rows(6, 128), weight_of(32, 128)
    expected = linear(x, weight, None, (3,))
    for k in (3, 90):  # a column that is kept, and one that is rotated
        bad = x.clone()
        bad[2, k] = value
        y = linear(bad, weight, None, (3,))
        assert not y[2].isfinite().any()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(y[others], expected[others])


@each_isa
def test_zeros_and_the_smallest_and_the_largest(isa):
    weight = weight_of(32, 128)
    assert torch.equal(linear(torch.zeros(2, 128), weight), torch.zeros(2, 32))
    check(torch.full((2, 128), 1e-38), weight)
    largest = torch.full((1, 128), torch.finfo(torch.float32).max / 2**12)
    assert linear(largest, weight).isfinite().all()


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_the_weight_among_processes_have_the_same_bits(isa, dtype, processes):
    """Cut before it is quantised, as tensor parallelism does it, and after."""
    x, weight = rows(9, 320, dtype), weight_of(96, 320, dtype)
    columns = (1, 106, 200)
    whole = linear(x, weight, None, columns)
    parts = [linear(x, part.contiguous(), None, columns) for part in weight.chunk(processes)]
    assert torch.equal(torch.cat(parts, 1), whole)
    settings = {"columns": columns, "scheme": "int8-rotated"}
    quantized = int8fx.Int8Weight.from_float(weight, **settings)
    cut = [F.linear(x, part) for part in quantized.chunk(processes)]
    assert all(type(part) is int8fx.Int8Weight for part in quantized.chunk(processes))
    assert torch.equal(torch.cat(cut, 1), whole)


# --- several of one x -----------------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize("with_bias", [False, True])
def test_several_linears_are_what_each_is_alone(isa, dtype, with_bias):
    """Some with the same columns, some with others, some with none."""
    K = 192
    sets = [(3, 9), (3, 9), (), (3, 10), (), (3, 9, 100)]
    weights = [weight_of(16 * i + 5, K, dtype, seed=i) for i in range(len(sets))]
    parts = [parts_of(w, each) for each, w in zip(sets, weights, strict=True)]
    biases = (
        [torch.randn(len(w), generator=generator()).to(dtype) for w in weights] if with_bias else []
    )
    for M in (0, 1, 19):
        x = rows(M, K, dtype)
        given = [list(each) for each in zip(*parts, strict=True)]
        outputs = ops.rotated_linears(x, 0.0, 64, "hadamard", *given, biases)
        for index, y in enumerate(outputs):
            bias = biases[index] if with_bias else None
            assert torch.equal(y, ops.rotated_linear(x, 0.0, 64, "hadamard", *parts[index], bias))


def test_leading_dimensions():
    x, weight = rows(6, 128), weight_of(32, 128)
    y = linear(x.view(2, 3, 128), weight)
    assert torch.equal(y, linear(x, weight).view(2, 3, 32))
    assert torch.equal(linear(x[0], weight), linear(x, weight)[0])


@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_are_what_torch_asks_of_them(with_bias):
    x, weight = rows(5, 96), weight_of(24, 96)
    parts = parts_of(weight, (1, 32), 32)
    bias = torch.randn(24) if with_bias else None
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    x.requires_grad_()
    torch.library.opcheck(ops.rotated_linear, (x, 0.0, 32, "hadamard", *parts, bias), test_utils=checks)
    lists = [[part, part] for part in parts]
    biases = [bias, bias] if with_bias else []
    torch.library.opcheck(
        ops.rotated_linears, (x, 0.0, 32, "hadamard", *lists, biases), test_utils=checks
    )


def test_gradients_are_those_of_the_weight_that_the_parts_stand_for():
    x, weight = rows(5, 100).requires_grad_(), weight_of(24, 100)
    kept = rotated(64, "hadamard", (1, 33))
    parts = parts_of(weight, (1, 33))
    bias = torch.randn(24, requires_grad=True)
    grad = torch.randn(5, 24, generator=generator())
    ops.rotated_linear(x, 0.0, 64, "hadamard", *parts, bias).backward(grad)
    w_hat = kept.dequantize(kept.quantize(weight), 24, 100)
    assert torch.equal(w_hat[:, [1, 33]], weight[:, [1, 33]])
    torch.testing.assert_close(x.grad, grad @ w_hat)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    x.grad = None
    lists = [[part, part] for part in parts]
    sum(ops.rotated_linears(x, 0.0, 64, "hadamard", *lists, [])).backward(grad)
    torch.testing.assert_close(x.grad, 2 * grad @ w_hat)


@each_dtype
@pytest.mark.parametrize("columns", [(), (3, 50)])
def test_experts_are_the_linears_of_their_rows(dtype, columns):
    E, N, K = 3, 24, 96
    weights = torch.stack([weight_of(N, K, dtype, seed=e) for e in range(E)])
    parts = parts_of(weights, columns)
    x, experts = rows(7, K, dtype), torch.tensor([2, 0, 2, 3, 0, -1, 2])  # 3 is none
    y = ops.rotated_expert_linear(x, 0.0, 64, "hadamard", *parts, experts, None)
    for row, e in enumerate(experts.tolist()):
        expected = torch.zeros(N, dtype=dtype) if e == E else linear(x[row], weights[e], None, columns)
        assert torch.equal(y[row], expected)
    by_ends = ops.rotated_expert_linear(x, 0.0, 64, "hadamard", *parts, None, torch.tensor([2, 2, 7]))
    assert torch.equal(by_ends[2:], linear(x[2:], weights[2], None, columns))
    x.requires_grad_()
    ops.rotated_expert_linear(x, 0.0, 64, "hadamard", *parts, experts, None).sum().backward()
    kept = rotated(64, "hadamard", columns)
    w_hat = kept.dequantize(kept.quantize(weights[2]), N, K)
    torch.testing.assert_close(x.grad[0].float(), w_hat.sum(0), rtol=2e-2, atol=2e-2)
    assert not x.grad[3].any()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"block": 48}, "block"),
        ({"rotation": "hadamar"}, "rotation"),
        ({"threshold": 6.0}, "threshold"),
        ({"columns": torch.tensor([3, 300], dtype=torch.int32)}, "columns"),
        ({"columns": torch.tensor([3], dtype=torch.int32)}, "columns"),
        ({"w_scale": torch.ones(17)}, "w_columns"),
    ],
)
def test_what_does_not_fit_is_named(changed, words):
    parts = parts_of(weight_of(32, 128), (1, 33))
    names = ("weight", "w_scale", "w_columns", "columns")
    given = {
        "threshold": 0.0,
        "block": 64,
        "rotation": "hadamard",
        **dict(zip(names, parts, strict=True)),
        **changed,
    }
    with pytest.raises((RuntimeError, ValueError), match=words):
        ops.rotated_linear(rows(2, 128), *given.values(), None)


# --- LLM.int8() beside static columns --------------------------------------------------------------


def static(x: Tensor, weight: Tensor, columns=(), threshold: float = 6.0, bias=None) -> Tensor:
    choice = SCHEMES["llm.int8"].choice(
        decomposition="static", columns=tuple(columns), threshold=threshold
    )
    return choice.product(x, choice.quantize(weight), bias)


@each_isa
@each_dtype
@pytest.mark.parametrize("threshold", [0.0, 1.0, 6.0, 1e9])
@pytest.mark.parametrize("count", [0, 1, 8])
def test_static_columns_and_token_wise_outliers(isa, dtype, threshold, count):
    weight, bias = weight_of(40, 130, dtype), torch.randn(40, generator=generator()).to(dtype)
    columns = tuple(sorted(torch.randperm(130, generator=generator())[:count].tolist()))
    scheme = SCHEMES["llm.int8"]
    settings = scheme.choice(decomposition="static", columns=columns, threshold=threshold).settings
    for M in (0, 1, 7, 35):
        x = rows(M, 130, dtype)
        y = static(x, weight, columns, threshold, bias)
        expected = scheme.reference(x, weight, bias, settings)
        magnitude = x.double().abs() @ weight.double().abs().t() + expected.abs() + 1
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        assert y.dtype == dtype
        assert ((y.double() - expected).abs() <= (2.0**-24 * 130 * 4 + eps) * magnitude).all()


@each_isa
def test_with_static_columns_a_row_depends_on_itself_alone(isa):
    x, weight = rows(41, 320), weight_of(100, 320)
    whole = static(x, weight, (1, 77))
    for M in (1, 2, 7, 16, 33):
        assert torch.equal(static(x[:M], weight, (1, 77)), whole[:M])
    order = torch.randperm(41, generator=generator())
    assert torch.equal(static(x[order], weight, (1, 77)), whole[order])


def test_without_columns_static_is_token():
    x, weight = rows(9, 128), weight_of(32, 128)
    choice = SCHEMES["llm.int8"].choice(decomposition="token")
    assert torch.equal(static(x, weight), choice.product(x, choice.quantize(weight), None))


def test_a_calibration_is_for_static_alone_of_the_decompositions():
    model = Attention()
    options = {"calibration": calibration(model, 32, 5), "decomposition": "static"}
    y, report = compile_once(model, rows(5, 96), backend_options=options)
    assert report.graph.count("rotated_linears.default(") == 1
    quantized = int8fx.quantize_(copy.deepcopy(model), **options)
    assert quantized.q.weight.options["columns"] == (5, 32)
    assert torch.equal(quantized(rows(5, 96)), y)
    with pytest.raises(ValueError, match=r"decomposition.*'static'"):
        SCHEMES["llm.int8-zeropoint"].choice(decomposition="static")


# --- in a model -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three linears of one x, two of them with a bias, and one of what they give."""

    def __init__(self, K: int = 96) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(K, 64), nn.Linear(K, 32)
        self.v, self.o = nn.Linear(K, 64, bias=False), nn.Linear(64, K)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.v(x) + self.k(x).repeat(1, 2))


def calibration(model: nn.Module, *columns: int) -> Calibration:
    named = model.named_modules()
    linears = [(path, module) for path, module in named if isinstance(module, nn.Linear)]
    return Calibration(
        "Attention",
        1,
        tuple(
            CalibratedLinear(path, tuple(linear.weight.shape), columns, (1.0,) * len(columns))
            for path, linear in linears
        ),
    )


OPTIONS = {"scheme": "int8-rotated"}


def test_compiled_linears_of_one_input_are_one_call():
    model, x = Attention(), rows(5, 96)
    y, report = compile_once(model, x, backend_options=OPTIONS)
    assert [decision.scheme for decision in report.decisions] == ["int8-rotated"] * 4
    assert report.graph.count("rotated_linears.default(") == 1  # q and k; v has no bias
    assert report.graph.count("rotated_linear.default(") == 2
    assert (y - model(x)).norm() < 0.02 * model(x).norm()


def test_compiled_is_the_scheme_bit_for_bit():
    model, x = Attention(), rows(5, 96)
    options = {**OPTIONS, "calibration": calibration(model, 32, 5), "columns": 2}
    y, _ = compile_once(model, x, backend_options=options)
    q, k, v = (linear(x, m.weight, m.bias, (5, 32)) for m in (model.q, model.k, model.v))
    expected = linear(q * v + k.repeat(1, 2), model.o.weight, model.o.bias, (5, 32))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_rows_and_modes(mode, dynamic):
    model = Attention()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", mode=mode, dynamic=dynamic, options=None)
    del compiled  # options and a mode exclude each other in torch; the scheme comes by options
    compiled = torch.compile(model, backend="llmint8", dynamic=dynamic, options=OPTIONS)
    with torch.no_grad():
        whole = compiled(rows(9, 96))
        for M in (1, 4):
            assert torch.equal(compiled(rows(9, 96)[:M]), whole[:M])


def test_a_bias_that_is_added_afterwards_moves_into_the_linear():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(96, 32, bias=False).requires_grad_(False)
            self.bias = nn.Parameter(torch.ones(32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) @ self.linear.weight.t() + self.bias

    _, report = compile_once(Added(), rows(3, 96), backend_options=OPTIONS)
    (call,) = [line for line in report.graph.splitlines() if "rotated_linear.default(" in line]
    assert "bias_)" in call


def test_a_write_between_keeps_linears_apart():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(96, 32), nn.Linear(96, 32)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x.mul_(2)
            return y + self.second(x)

    model, x = Written(), rows(3, 96)
    expected = linear(x, model.first.weight, model.first.bias)
    expected = expected + linear(x * 2, model.second.weight, model.second.bias)
    y, report = compile_once(model, x.clone(), backend_options=OPTIONS)
    assert "rotated_linears" not in report.graph
    assert torch.equal(y, expected)


def test_blocks_that_share_a_graph_each_run_with_their_own_columns():
    model = nn.ModuleList(Attention() for _ in range(3))
    x = rows(5, 96)
    torch._dynamo.reset()
    for block in model:
        block.compile(backend="llmint8", options=OPTIONS)
    with torch.no_grad():
        for block in model:
            q, k, v = (linear(x, m.weight, m.bias) for m in (block.q, block.k, block.v))
            expected = linear(q * v + k.repeat(1, 2), block.o.weight, block.o.bias)
            assert torch.equal(block(x), expected)


def test_gradients_reach_the_input_through_a_compiled_model():
    model, x = Attention(), rows(5, 96)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", options=OPTIONS)
    given, of_float = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(given).sum().backward()
    model(of_float).sum().backward()
    assert (given.grad - of_float.grad).norm() < 0.03 * of_float.grad.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 48}, ["'block'", "48", "16, 32, 64, 128, 256"]),
        ({"block": True}, ["'block'", "True"]),
        ({"rotation": "haar"}, ["'rotation'", "'haar'", "'convrot'"]),
        ({"columns": 65}, ["'columns'", "65", "0 to 64"]),
        ({"columns": 8}, ["'columns'", "8", "'calibration'"]),
        ({"calibration": 3}, ["'calibration'", "3", "int8fx.calibrate"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match="backend 'llmint8'") as raised:
        int8fx.Options.parse({**OPTIONS, **options})
    assert [word for word in words if word not in str(raised.value)] == []
