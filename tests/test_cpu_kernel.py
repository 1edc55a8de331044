"""The CPU kernels: every instruction set of this machine against the reference in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8fx.kernels.cpu import build
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.linear_reference import linear_reference
from int8fx.kernels.ops.quantize_reference import EVERYTHING, quantize_reference, quantize_weight

REASON = cpu.load()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"no CPU kernel: {REASON}")
ISAS = cpu.isas() if REASON is None else []
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# Around the kernels' tiles (2, 6, 12, 16 and 32 rows), blocks (16 channels) and steps (4 and 64 k); and
# a K so long that a few rows read weights in another order.
ROWS = (0, 1, 2, 5, 6, 7, 12, 13, 16, 17, 25, 33, 40, 70)
SHAPES = ((1, 1), (63, 15), (64, 16), (65, 17), (130, 48), (576, 100), (2100, 40))
each_shape = pytest.mark.parametrize(("K", "N"), SHAPES, ids=lambda value: str(value))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_weight(K: int, N: int) -> tuple[Tensor, Tensor]:
    return quantize_weight(torch.randn(N, K))


def in_float64(x_int8, x_scale, x_outlier, outlier_columns, w_int8, w_scale, bias) -> Tensor:
    return linear_reference(
        x_int8,
        x_scale.double(),
        x_outlier.double(),
        outlier_columns,
        w_int8,
        w_scale.double(),
        None if bias is None else bias.double(),
    )


def float_bound(
    x_int8, x_scale, x_outlier, outlier_columns, w_int8, w_scale, bias, roundings=4
) -> Tensor:
    """How far a correct result may be from the one in float64.

    At most one fp32 rounding per outlier, and ``roundings`` of the integer sum and in the epilogue,
    each half an ulp of at most the sum of all terms' magnitudes; then one to the output's dtype, whose
    subnormals are spaced by `tiny * eps`.
    """
    count = 0 if outlier_columns is None else int(outlier_columns.sum())
    magnitude = (x_int8.double() @ w_int8.double().t()).abs() * x_scale.double().unsqueeze(1)
    if count:
        magnitude += x_outlier.double().abs() @ w_int8.double().abs().t()
    magnitude *= w_scale.double()
    if bias is not None:
        magnitude += bias.double().abs()
    single, out = torch.finfo(torch.float32), torch.finfo(x_outlier.dtype)
    return magnitude * ((count + roundings) * single.eps + out.eps) / 2 * 1.01 + out.tiny * out.eps


def check_against_float64(quantized, w_int8, w_scale, bias) -> None:
    y = ops.int8_linear(*quantized, cpu.pack(w_int8), w_scale, bias)
    expected = in_float64(*quantized, w_int8, w_scale, bias)
    assert y.dtype == quantized[2].dtype
    error = (y.double() - expected).abs()
    assert (error <= float_bound(*quantized, w_int8, w_scale, bias)).all(), error.max()


# --- packing -------------------------------------------------------------------------------------


@each_shape
def test_unpack_undoes_pack(K, N):
    w_int8, _ = random_weight(K, N)
    packed = cpu.pack(w_int8)
    assert packed.shape == (-(-N // 16), -(-K // 64) * 64 * 16 + 64)
    assert torch.equal(cpu.unpack(packed, N, K), w_int8)
    assert torch.equal(cpu.unpack(cpu.pack(w_int8.t()), K, N), w_int8.t())


def test_packed_layout():
    w_int8 = torch.arange(16 * 64, dtype=torch.int32).reshape(16, 64).to(torch.int8)
    packed = cpu.pack(w_int8)[0]
    n, k = 5, 42
    assert packed[(k // 4) * 64 + n * 4 + k % 4] == w_int8[n, k]
    assert torch.equal(packed[-64:].view(torch.int32), w_int8.sum(1, dtype=torch.int32))


# --- arithmetic ----------------------------------------------------------------------------------


@needs_kernel
@each_isa
@each_shape
def test_integer_product_is_exact(isa, K, N):
    w_int8 = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    packed = cpu.pack(w_int8)
    for M in ROWS:
        x_int8 = torch.randint(-128, 128, (M, K), dtype=torch.int8)
        y = ops.int8_linear(x_int8, torch.ones(M), torch.empty(0), None, packed, torch.ones(N), None)
        assert torch.equal(y, (x_int8.double() @ w_int8.double().t()).float())


@needs_kernel
@each_isa
@each_dtype
@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("threshold", [1e-9, 1.0, 3.0, 100.0])  # all, many, few and no columns
def test_outliers_against_float64(isa, dtype, decomposition, threshold):
    w_int8, w_scale = random_weight(130, 40)
    for M in (1, 7, 35):
        quantized = quantize_reference(torch.randn(M, 130).to(dtype), threshold, decomposition)
        check_against_float64(quantized, w_int8, w_scale, torch.randn(40))


@needs_kernel
@pytest.mark.parametrize("isa", [*ISAS, "auto"], indirect=True)
def test_any_shape_against_float64(isa):
    @settings(max_examples=25, deadline=None)
    @given(
        M=st.integers(0, 70),
        K=st.integers(1, 200),
        N=st.integers(1, 70),
        threshold=st.sampled_from([0.5, 2.0, 4.0]),
        decomposition=st.sampled_from(["column", "token"]),
        dtype=st.sampled_from(DTYPES),
        bias_dtype=st.sampled_from([None, *DTYPES, torch.float64]),
        seed=st.integers(0, 100),
    )
    def check(M, K, N, threshold, decomposition, dtype, bias_dtype, seed):
        torch.manual_seed(seed)
        w_int8, w_scale = random_weight(K, N)
        quantized = quantize_reference(torch.randn(M, K).to(dtype), threshold, decomposition)
        bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
        check_against_float64(quantized, w_int8, w_scale, bias)

    check()


@needs_kernel
@each_isa
@each_dtype
def test_rounds_as_torch_does(isa, dtype):
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3e38, 65519.0, 65520.0, 1e-7, -1e-40])
    values = torch.cat([values, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])])
    N = len(values)
    x_int8 = torch.zeros(2, 4, dtype=torch.int8)
    packed = cpu.pack(torch.zeros(N, 4, dtype=torch.int8))
    carrier = torch.empty(0, dtype=dtype)
    y = ops.int8_linear(x_int8, torch.ones(2), carrier, None, packed, torch.ones(N), values)
    torch.testing.assert_close(y, values.to(dtype).expand(2, N), rtol=0, atol=0, equal_nan=True)


@needs_kernel
@each_isa
@each_dtype
@pytest.mark.parametrize("decomposition", ["column", "token"])
def test_nan_and_inf_stay_in_their_rows(isa, dtype, decomposition):
    w_int8, w_scale = random_weight(100, 20)
    w_int8[3, 7] = 0
    x = torch.randn(40, 100).to(dtype)
    x[5, 11] = float("nan")
    x[9, 7] = float("inf")
    quantized = quantize_reference(x, 3.0, decomposition)
    y = ops.int8_linear(*quantized, cpu.pack(w_int8), w_scale, None)
    expected = in_float64(*quantized, w_int8, w_scale, None)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y[5].isnan().all() and y[9, 3].isnan() and y[9, 2].isinf()


@needs_kernel
@each_isa
@pytest.mark.parametrize("flagged", [3, 100], ids=["few columns", "all columns"])
def test_row_does_not_depend_on_the_batch(isa, flagged):
    """Bit for bit: among other rows, of another number, with columns flagged for their sake."""
    w_int8, w_scale = random_weight(100, 40)
    packed, bias = cpu.pack(w_int8), torch.randn(40)
    x_int8 = torch.randint(-127, 128, (70, 100), dtype=torch.int8)
    x_scale = torch.rand(70)
    x_outlier = torch.where(torch.rand(70, 100) < torch.rand(70, 1), torch.randn(70, 100), 0)
    columns = torch.arange(100) < flagged
    x_outlier[:, ~columns] = 0
    whole = ops.int8_linear(x_int8, x_scale, x_outlier, columns, packed, w_scale, bias)
    for M in (1, 2, 7, 12, 16, 17, 32, 47):
        own = columns & (x_outlier[-M:] != 0).any(0)
        part = ops.int8_linear(x_int8[-M:], x_scale[-M:], x_outlier[-M:], own, packed, w_scale, bias)
        assert torch.equal(part, whole[-M:])


@needs_kernel
def test_isas_agree_bit_for_bit():
    """A row's result may not depend on M either where M chooses the kernel."""
    w_int8, w_scale = random_weight(300, 50)
    quantized = quantize_reference(torch.randn(40, 300), 1.5, "token")
    results = {}
    for isa in ISAS:
        if isa != "portable":  # it need not have fused multiply-add
            cpu.use_isa(isa)
            results[isa] = ops.int8_linear(*quantized, cpu.pack(w_int8), w_scale, torch.randn(50) * 0)
    cpu.use_isa("auto")
    first, *others = results.values()
    assert all(torch.equal(first, other) for other in others)


# --- weights only --------------------------------------------------------------------------------


def weight_only(x: Tensor, weights: list[tuple[Tensor, Tensor]], biases: list[Tensor]) -> list[Tensor]:
    """``x @ (w_int8 · w_scale)ᵀ + bias`` of each weight, by the kernel."""
    packed, scales = [cpu.pack(w_int8) for w_int8, _ in weights], [w_scale for _, w_scale in weights]
    return ops.int8_linears(x, EVERYTHING, "all", packed, scales, biases)


def check_weight_only(x: Tensor, w_int8: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    """At most one fp32 rounding for each k, three to add a channel's parts, and two in the epilogue.

    In a product in limbs an element is off by 2**-22 (16-bit) or 2**-30 of the row's largest, too.
    """
    (y,) = weight_only(x, [(w_int8, w_scale)], [] if bias is None else [bias])
    carrier = (torch.zeros_like(x, dtype=torch.int8), torch.zeros(x.shape[:-1]), x)
    everything = (*carrier, torch.ones(x.shape[-1], dtype=torch.bool), w_int8, w_scale, bias)
    expected = in_float64(*everything)
    assert y.dtype == x.dtype and y.shape == expected.shape
    bound = float_bound(*everything, roundings=5)
    if x.numel():
        last = x.double().abs().amax(-1, keepdim=True) * 2.0 ** (
            -30 if x.dtype == torch.float32 else -22
        )
        bound += last * w_int8.double().abs().sum(1) * w_scale.double()
    assert ((y.double() - expected).abs() <= bound).all()


@needs_kernel
@pytest.mark.parametrize("isa", [*ISAS, "auto"], indirect=True)
@each_dtype
@each_shape
def test_weight_only_against_float64(isa, dtype, K, N):
    w_int8, w_scale = random_weight(K, N)
    for M in ROWS:
        check_weight_only(torch.randn(M, K).to(dtype), w_int8, w_scale, torch.randn(N) if M else None)


@needs_kernel
@pytest.mark.parametrize("isa", [*ISAS, "auto"], indirect=True)
@each_dtype
def test_weight_only_rows_of_every_size(isa, dtype):
    """Elements far below the row's largest, and rows near the ends of what the dtype holds."""
    w_int8, w_scale = random_weight(130, 20)
    sizes = torch.tensor([2.0**-10, 1.0, 100.0] if dtype == torch.float16 else [1e-30, 1.0, 1e30])
    x = torch.randn(3, 130) * sizes.unsqueeze(1) * torch.logspace(-4, 0, 130)
    x[:, 7] = 40 * sizes
    check_weight_only(x.to(dtype), w_int8, w_scale, None)


@needs_kernel
@each_dtype
@pytest.mark.parametrize("K", [2**17 - 1, 2**17 + 1])  # the second would overflow in limbs
def test_weight_only_sums_do_not_overflow(dtype, K):
    """-128 · -128 in the two lower limbs of every k but one."""
    x = torch.full((1, K), -32896 * 2.0**-22).to(dtype)
    x[0, 0] = 0.75
    check_weight_only(x, torch.full((16, K), -128, dtype=torch.int8), torch.ones(16) / 4, None)


@needs_kernel
@each_isa
@each_dtype
def test_weight_only_reads_every_weight_as_it_is(isa, dtype):
    """The identity, times each of the 256 values that a weight can have."""
    values = torch.arange(-128, 128, dtype=torch.int8)
    w_int8 = torch.stack([values.roll(shift) for shift in range(21)])
    for M in (1, 256):
        (y,) = weight_only(torch.eye(256)[:M].to(dtype), [(w_int8, torch.ones(21))], [])
        assert torch.equal(y, w_int8.t()[:M].to(dtype))


@needs_kernel
@each_isa
@each_dtype
def test_weight_only_keeps_nan_and_inf_in_their_rows_and_rows_apart(isa, dtype):
    weights = [random_weight(100, N) for N in (33, 20)]
    weights[0][0][3, 7] = 0
    x = torch.randn(40, 100).to(dtype)
    x[5, 11], x[9, 7] = float("nan"), float("inf")
    whole = weight_only(x, weights, [])
    assert whole[0][5].isnan().all() and whole[0][9, 3].isnan() and whole[0][9, 2].isinf()
    others = [row for row in range(40) if row not in (5, 9)]
    assert all(y[others].isfinite().all() for y in whole)
    for M in (1, 2, 7, 13, 25):
        parts = weight_only(x[-M:], weights, [])
        assert all(torch.equal(part, y[-M:]) for part, y in zip(parts, whole, strict=True))


# --- calling -------------------------------------------------------------------------------------


@needs_kernel
def test_leading_dimensions_and_strides():
    w_int8, w_scale = random_weight(64, 24)
    packed = cpu.pack(w_int8)
    x = torch.randn(64, 5, 3).permute(2, 1, 0)
    x_int8, x_scale, x_outlier, columns = quantize_reference(x, 2.0, "column")
    bias = torch.randn(48)[::2]
    y = ops.int8_linear(x_int8, x_scale, x_outlier, columns, packed, w_scale, bias)
    flat = ops.int8_linear(
        x_int8.reshape(15, 64),
        x_scale.reshape(15),
        x_outlier.reshape(15, 64),
        columns,
        packed,
        w_scale,
        bias.contiguous(),
    )
    assert y.shape == (3, 5, 24)
    assert torch.equal(y.reshape(15, 24), flat)
    one_row = ops.int8_linear(
        x_int8[0, 0], x_scale[0, 0], x_outlier[0, 0], columns, packed, w_scale, bias
    )
    assert torch.equal(one_row, y[0, 0])


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads):
    w_int8, w_scale = random_weight(256, 700)
    packed = cpu.pack(w_int8)
    quantized = quantize_reference(torch.randn(150, 256), 2.0, "column")
    expected = ops.int8_linear(*quantized, packed, w_scale, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.int8_linear(*quantized, packed, w_scale, None), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@each_isa
@each_dtype
@pytest.mark.parametrize("decomposition", ["column", "token"])
@pytest.mark.parametrize("threshold", [0.0, 2.0, float("inf")])
def test_quantising_in_the_same_call_equals_doing_it_before(isa, dtype, decomposition, threshold):
    weights = [random_weight(99, N) for N in (33, 16, 100)]
    packed = [cpu.pack(w_int8) for w_int8, _ in weights]
    scales = [w_scale for _, w_scale in weights]
    biases = [torch.randn(33), torch.randn(16), torch.randn(100)]
    for M in (0, 1, 5, 40, 130):
        x = torch.randn(M, 99).to(dtype)
        if M > 4:
            x[1], x[2, 7], x[3, 8] = 0, float("nan"), float("inf")
        quantized = quantize_reference(x, threshold, decomposition)
        if threshold == 0:
            quantized = (*quantized[:2], x, None)
        together = ops.int8_linears(x, threshold, decomposition, packed, scales, biases)
        for y, *operands in zip(together, packed, scales, biases, strict=True):
            expected = ops.int8_linear(*quantized, *operands)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@needs_kernel
@each_isa
def test_quotients_round_as_divisions_do(isa):
    """Ties and their neighbours, over all exponents: where a reciprocal alone would be off by one."""
    K = 1024
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(250, 1, generator=generator) + 1
    scale *= 2.0 ** torch.arange(-130, 120).unsqueeze(1)
    tie = (torch.randint(-127, 127, (250, K), generator=generator) + 0.5) * scale
    x = torch.stack([tie, tie.nextafter(tie * 2), tie.nextafter(tie * 0)]).flatten(0, 1)
    x[:, 0] = 127 * scale.repeat(3, 1).squeeze(1)
    x_int8, x_scale, _, _ = quantize_reference(x, 0.0, "column")
    packed, ones = cpu.pack(torch.eye(K, dtype=torch.int8)), torch.ones(K)
    (y,) = ops.int8_linears(x, 0.0, "column", [packed], [ones], [])
    assert torch.equal(y, x_int8.float() * x_scale.unsqueeze(1))


@needs_kernel
def test_wrong_arguments_are_refused():
    w_int8, w_scale = random_weight(64, 16)
    x_int8, x_scale, x_outlier, columns = quantize_reference(torch.randn(2, 64), 2.0, "column")
    with pytest.raises(RuntimeError, match="weight must be packed"):
        ops.int8_linear(x_int8, x_scale, x_outlier, columns, w_int8, w_scale, None)
    with pytest.raises(RuntimeError, match="one scale per row"):
        ops.int8_linear(x_int8, x_scale[:1], x_outlier, columns, cpu.pack(w_int8), w_scale, None)


# --- building ------------------------------------------------------------------------------------


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build()
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(build.BuildError, match="/nowhere/g\\+\\+"):
        build.build()


def test_failing_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "error: no luck" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="no luck"):
        build.build()
    assert list((tmp_path / "cache" / "int8fx").iterdir()) == []


def test_unusable_cache_falls_back_to_a_temporary_directory(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compiler = tmp_path / "c++"
    writes_a_file = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ {writes_a_file}; }}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library = build.build()
    assert library.exists() and library.parent.parent == tmp_path
    library.parent.chmod(0o777)  # where others can write, they could plant a library
    with pytest.raises(build.BuildError, match="no writable directory"):
        build.build()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/g++", "the C++ compiler in $CXX is not there: /nowhere/g++"),
        ("g++ '", '$CXX is no command: "g++ \'": No closing quotation'),
    ],
)
def test_load_gives_the_reason(compiler, reason):
    script = "from int8fx.kernels.cpu import int8_linear as cpu; print(cpu.load())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"CXX": compiler, "PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == reason
