"""The operators: registration, the scheme's invariants, and its error bound, for any input."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from int8fx.kernels import table
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.quantize_reference import DECOMPOSITIONS, quantize_reference, quantize_weight
from int8fx.testing.bounds import HALF, expected_and_bound

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
decompositions = pytest.mark.parametrize("decomposition", DECOMPOSITIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llm_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: float = 6.0,
    decomposition: str = "column",
) -> Tensor:
    """One linear through the operators, as the rewritten graph calls them."""
    w_int8, w_scale = quantize_weight(weight)
    x_int8, x_scale, x_outlier, columns = ops.quantize(x, threshold, decomposition)
    if threshold == 0:
        x_outlier, columns = x, None
    packed = table.pack(w_int8)
    return ops.int8_linear(x_int8, x_scale, x_outlier, columns, packed, w_scale, bias)


# --- registration --------------------------------------------------------------------------------


@dtypes
@decompositions
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_opcheck_quantize(dtype, decomposition, threshold):
    x = normal(2, 3, 16).to(dtype)
    x[0, 0, 3] = 9
    torch.library.opcheck(ops.quantize, (x, threshold, decomposition))
    if threshold:
        # The tests of AOT dispatch in opcheck sum all outputs, integers too, and cannot.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments = (x.requires_grad_(), threshold, decomposition)
        torch.library.opcheck(ops.quantize, arguments, test_utils=checks)


@dtypes
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_opcheck_int8_linear(dtype, with_bias):
    x = normal(2, 3, 16).to(dtype)
    x[0, 0, 3] = 9
    w_int8, w_scale = quantize_weight(normal(8, 16))
    x_int8, x_scale, x_outlier, columns = ops.quantize(x, 6.0, "column")
    bias = normal(8).to(dtype) if with_bias else None
    for carrier in (x_outlier, x_outlier.clone().requires_grad_()):
        arguments = (x_int8, x_scale, carrier, columns, table.pack(w_int8), w_scale, bias)
        torch.library.opcheck(ops.int8_linear, arguments)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_opcheck_quantized_linears_cpu(with_bias):
    x = normal(3, 16)
    x[0, 3] = 9
    pairs = [quantize_weight(normal(N, 16, seed=N)) for N in (8, 24)]
    weights = [table.pack(w_int8) for w_int8, _ in pairs]
    scales = [w_scale for _, w_scale in pairs]
    biases = [normal(8), normal(24)] if with_bias else []
    for given_x in (x, x.clone().requires_grad_()):
        arguments = (given_x, 6.0, "column", weights, scales, biases)
        torch.library.opcheck(ops.quantized_linears_cpu, arguments)


def test_opcheck_unpack_weight():
    w_int8, _ = quantize_weight(normal(24, 40))
    torch.library.opcheck(ops.unpack_weight, (table.pack(w_int8), 24, 40))
    assert torch.equal(ops.unpack_weight(table.pack(w_int8), 24, 40), w_int8)


# --- quantise ------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
thresholds = st.sampled_from([0.0, 0.5, 3.0, 6.0, float("inf")])


@st.composite
def activations(draw):
    """Rows of any magnitude, with outliers anywhere and zeros."""
    M, K = draw(shapes)
    dtype = draw(st.sampled_from(DTYPES))
    x = normal(M, K, seed=draw(st.integers(0, 1000)))
    x = x * 10.0 ** draw(st.integers(-3, 2))
    for _ in range(draw(st.integers(0, 6))):
        m, k = draw(st.integers(0, M - 1)), draw(st.integers(0, K - 1))
        x[m, k] = draw(st.sampled_from([6.0, -6.0, 50.0, -3000.0, 0.0, 5.999]))
    if draw(st.booleans()):
        x[draw(st.integers(0, M - 1))] = 0
    return x.to(dtype)


@settings(max_examples=200, deadline=None)
@given(activations(), thresholds, st.sampled_from(DECOMPOSITIONS))
def test_quantise_is_within_half_a_step(x, threshold, decomposition):
    x_int8, x_scale, x_outlier, columns = quantize_reference(x, threshold, decomposition)
    outlier = x_outlier.double() if threshold else torch.zeros_like(x).double()
    restored = x_int8.double() * x_scale.double().unsqueeze(1) + outlier
    assert ((x.double() - restored).abs() <= HALF * x_scale.double().unsqueeze(1)).all()
    assert x_int8.abs().max() <= 127
    assert (x_scale > 0).all()
    if threshold:
        assert ((x_int8 == 0) | (x_outlier == 0)).all()
        assert torch.equal(columns, (x.float().abs() >= threshold).any(0))


@settings(max_examples=60, deadline=None)
@given(activations(), st.sampled_from(DECOMPOSITIONS))
def test_threshold_infinity_is_vector_wise(x, decomposition):
    for got, expected in zip(
        quantize_reference(x, float("inf"), decomposition)[:2],
        quantize_reference(x, 0.0, decomposition)[:2],
        strict=True,
    ):
        assert torch.equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(activations(), thresholds, st.randoms(use_true_random=False))
def test_token_rows_do_not_depend_on_their_batch(x, threshold, random):
    rows = random.sample(range(len(x)), random.randint(1, len(x)))
    whole = quantize_reference(x, threshold, "token")
    part = quantize_reference(x[rows], threshold, "token")
    assert torch.equal(whole[0][rows], part[0])
    assert torch.equal(whole[1][rows], part[1])
    if threshold:
        assert torch.equal(whole[2][rows], part[2])


@given(st.integers(1, 12), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(-40, 30))
@settings(max_examples=60, deadline=None)
def test_weights_are_within_half_a_step(N, K, dtype, exponent):
    limit = torch.finfo(dtype).max
    weight = (normal(N, K) * 2.0**exponent).clamp(-limit, limit).to(dtype)
    weight[0] = 0
    w_int8, w_scale = quantize_weight(weight)
    restored = w_int8.double() * w_scale.double().unsqueeze(1)
    assert ((weight.double() - restored).abs() <= HALF * w_scale.double().unsqueeze(1)).all()


# --- quantise and multiply in one call -------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(activations(), thresholds, st.sampled_from(DECOMPOSITIONS), st.booleans())
def test_one_call_is_bit_identical_to_its_parts(x, threshold, decomposition, with_bias):
    pairs = [quantize_weight(normal(N, x.shape[1], seed=N)) for N in (5, 40)]
    weights = [table.pack(w_int8) for w_int8, _ in pairs]
    scales = [w_scale for _, w_scale in pairs]
    biases = [normal(5), normal(40)] if with_bias else []
    got = ops.quantized_linears_cpu(x, threshold, decomposition, weights, scales, biases)
    x_int8, x_scale, x_outlier, columns = ops.quantize(x, threshold, decomposition)
    outliers = (x, None) if threshold == 0 else (x_outlier, columns)
    for y, weight, w_scale, bias in zip(got, weights, scales, biases or [None] * 2, strict=True):
        assert torch.equal(y, ops.int8_linear(x_int8, x_scale, *outliers, weight, w_scale, bias))


# --- the linear ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    activations(),
    st.integers(1, 40),
    thresholds,
    st.sampled_from(DECOMPOSITIONS),
    st.booleans(),
)
def test_error_is_inside_the_derived_bound(x, N, threshold, decomposition, with_bias):
    weight = normal(N, x.shape[1], seed=7).to(x.dtype)
    bias = normal(N, seed=8).to(x.dtype) if with_bias else None
    y = llm_int8(x, weight, bias, threshold, decomposition)
    expected, bound = expected_and_bound(x, weight, bias, threshold, decomposition)
    representable = expected.abs() + bound < torch.finfo(x.dtype).max
    assert ((y.double() - expected).abs() <= bound)[representable].all()


@settings(max_examples=60, deadline=None)
@given(activations(), thresholds, st.sampled_from(DECOMPOSITIONS), st.randoms(use_true_random=False))
def test_permuted_rows_give_permuted_results(x, threshold, decomposition, random):
    order = list(range(len(x)))
    random.shuffle(order)
    weight = normal(24, x.shape[1], seed=7)
    y = llm_int8(x, weight, None, threshold, decomposition)
    assert torch.equal(llm_int8(x[order], weight, None, threshold, decomposition), y[order])


@settings(max_examples=60, deadline=None)
@given(activations(), thresholds)
def test_token_results_do_not_depend_on_the_batch(x, threshold):
    weight = normal(24, x.shape[1], seed=7)
    y = llm_int8(x, weight, None, threshold, "token")
    for m in range(len(x)):
        alone = llm_int8(x[m : m + 1], weight, None, threshold, "token")
        assert torch.equal(alone[0], y[m])


def test_dropping_the_outliers_breaks_the_bound():
    """The oracle is sharp: without the outlier product the bound does not hold."""
    x, weight = normal(4, 64), normal(16, 64, seed=1)
    x[1, 5] = 60.0
    w_int8, w_scale = quantize_weight(weight)
    x_int8, x_scale, x_outlier, _ = ops.quantize(x, 6.0, "column")
    y = ops.int8_linear(x_int8, x_scale, x_outlier, None, table.pack(w_int8), w_scale, None)
    expected, bound = expected_and_bound(x, weight, None, 6.0, "column")
    assert ((y.double() - expected).abs() > bound).any()


@dtypes
@decompositions
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_inputs_come_out_in_the_same_rows(dtype, decomposition, threshold, value):
    x, weight = normal(5, 32).to(dtype), normal(16, 32, seed=1).to(dtype)
    x[1, 3], x[3, 3] = value, 20.0
    y = llm_int8(x, weight, None, threshold, decomposition)
    expected = F.linear(x, weight)
    assert torch.equal(y.isfinite().all(1), expected.isfinite().all(1))
    assert not y[1].isfinite().any()
    finite, bound = expected_and_bound(x[[0, 2, 4]], weight, None, threshold, "token")
    step = expected_and_bound(x[[0, 2, 3, 4]], weight, None, threshold, decomposition)[1]
    assert ((y[[0, 2, 4]].double() - finite).abs() <= bound + step[[0, 1, 3]]).all()


@dtypes
@decompositions
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize(
    ("M", "K", "N"), [(0, 8, 8), (1, 1, 1), (3, 1, 5), (1, 64, 16), (2, 65, 17), (33, 130, 70)]
)
def test_shapes(dtype, decomposition, threshold, M, K, N):
    x, weight, bias = normal(M, K).to(dtype), normal(N, K, seed=1).to(dtype), normal(N).to(dtype)
    y = llm_int8(x, weight, bias, threshold, decomposition)
    assert y.shape == (M, N)
    assert y.dtype == dtype
    expected, bound = expected_and_bound(x, weight, bias, threshold, decomposition)
    assert ((y.double() - expected).abs() <= bound).all()


@decompositions
def test_rows_of_zeros_and_rows_of_outliers(decomposition):
    x, weight, bias = normal(3, 32), normal(16, 32, seed=1), normal(16)
    x[0], x[1] = 0, 100.0
    y = llm_int8(x, weight, bias, 6.0, decomposition)
    assert torch.equal(y[0], bias)
    expected, bound = expected_and_bound(x, weight, bias, 6.0, decomposition)
    assert ((y.double() - expected).abs() <= bound).all()


@decompositions
def test_non_contiguous_inputs(decomposition):
    x, weight = normal(32, 6).t(), normal(16, 32, seed=1)
    x[2, 4] = 11.0
    y = llm_int8(x, weight.t().contiguous().t(), None, 6.0, decomposition)
    assert torch.equal(y, llm_int8(x.contiguous(), weight, None, 6.0, decomposition))


@dtypes
def test_gradient_of_the_input_against_float64(dtype):
    x, weight = normal(4, 32).to(dtype), normal(16, 32, seed=1).to(dtype)
    x[1, 3] = 40.0
    x.requires_grad_()
    for threshold in (0.0, 6.0):
        x.grad = None
        y = llm_int8(x, weight, None, threshold)
        upstream = normal(4, 16, seed=2).to(dtype)
        y.backward(upstream)
        w_int8, w_scale = quantize_weight(weight)
        w_hat = w_int8.double() * w_scale.double()[:, None]
        expected = upstream.double() @ w_hat
        # ŵ and each product are rounded to dtype once, sums are taken in fp32.
        eps = torch.finfo(dtype).eps
        bound = 3 * eps * (upstream.double().abs() @ w_hat.abs()) + 1e-6
        assert ((x.grad.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("outputs", [1, 2])
def test_saved_tensors_are_asked_for_once(outputs):
    """Gradient checkpointing computes them again then, and refuses to do so twice."""
    quantized = [quantize_weight(normal(16, 64, seed=i)) for i in range(outputs)]
    parts = [table.pack(weight) for weight, _ in quantized], [w_scale for _, w_scale in quantized]

    def loss(x):
        products = ops.quantized_linears_cpu(x, 6.0, "column", *parts, [])
        return sum(y.pow(2).sum() for y in products)

    gradients = []
    for run in (loss, functools.partial(checkpoint, loss, use_reentrant=False)):
        x = normal(3, 64, seed=9).requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
