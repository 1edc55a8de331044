"""Linears of 4-bit weights by groups: every instruction set of this machine against float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import int8fx
from int8fx.kernels.cpu import grouped as layout
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.formats.grouped import WHOLE, ZEROS, from_codes, grouped
from int8fx.kernels.ops import grouped_linear as ops
from int8fx.kernels.ops.rotation import rotate_weight
from int8fx.kernels.schemes.scheme import Choice, eagerly
from int8fx.testing.grouped_bound import expected_and_bound
from int8fx.testing.rotations import rotation_error

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no CPU kernel: {REASON}")
ISAS = [*cpu.isas(), "auto"] if REASON is None else []
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SCHEMES = ("w4a16-group", "w4a8-group")
each_scheme = pytest.mark.parametrize("name", SCHEMES)
# w4a8-group's weights of another system: not rotated.
PLAIN = {"w4a16-group": {}, "w4a8-group": {"rotation": "none"}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(M: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    x = torch.randn(M, K, generator=generator(seed)) + 0.3
    x[:, K // 3] *= 20
    return x.to(dtype)


def weight_of(N: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=generator(seed)).to(dtype)


def check(choice: Choice, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    y = choice.lower(eagerly, x, choice.quantize(weight), bias)
    expected, bound = expected_and_bound(choice, x, choice.weight_format.quantize(weight), bias)
    assert y.dtype == x.dtype and y.shape == expected.shape
    excess = (y.double() - expected).abs() - bound
    assert (excess <= 0).all(), excess.max()


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "stored"), [(1, 1), (16, 4), (17, 5), (40, 48), (3, 130)])
def test_packing_is_undone_bit_for_bit(N, stored):
    codes = torch.randint(0, 256, (N, stored), generator=generator(), dtype=torch.uint8)
    packed = layout.pack(codes)
    assert tuple(packed.shape) == layout.packed_shape(N, stored)
    assert torch.equal(layout.unpack(packed, N, stored), codes)
    if stored % 4 == 0 and N % 16 == 0:
        assert packed.numel() == codes.numel()  # half a byte each


# --- against float64 ------------------------------------------------------------------------------


@each_isa
@each_dtype
@each_scheme
@pytest.mark.parametrize(("K", "N"), [(64, 16), (576, 40), (100, 33), (1, 1), (33, 5), (2048, 20)])
def test_shapes_and_rows(isa, name, dtype, K, N):
    choice = int8fx.SCHEMES[name].choice()
    bias = torch.randn(N, generator=generator()).to(dtype)
    for M in (0, 1, 2, 5, 12, 13, 30):
        check(choice, rows(M, K, dtype), weight_of(N, K, dtype), bias)


@each_isa
@each_scheme
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group_size", [16, 48, 64, 256, WHOLE])
def test_groups_and_zeros(isa, name, zeros, group_size):
    for how, K in itertools.product(({}, PLAIN[name]), (96, 260)):
        choice = int8fx.SCHEMES[name].choice(group_size=group_size, zeros=zeros, **how)
        for M, dtype in ((1, torch.bfloat16), (7, torch.float32), (14, torch.float16)):
            check(choice, rows(M, K, dtype), weight_of(24, K, dtype) + 0.5)


@each_isa
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_columns_in_16_bit(isa, rotation, count):
    columns = tuple(sorted(torch.randperm(320, generator=generator())[:count].tolist()))
    choice = int8fx.SCHEMES["w4a8-group"].choice(columns=columns, rotation=rotation)
    for M, dtype in ((1, torch.float32), (3, torch.bfloat16), (30, torch.float16)):
        check(choice, rows(M, 320, dtype), weight_of(40, 320, dtype))


@each_isa
def test_anything_against_float64(isa):
    @settings(max_examples=40, deadline=None)
    @given(
        name=st.sampled_from(SCHEMES),
        M=st.integers(0, 30),
        K=st.integers(1, 300),
        N=st.integers(1, 50),
        dtype=st.sampled_from(DTYPES),
        group_size=st.sampled_from([16, 32, 80, 128, WHOLE]),
        zeros=st.sampled_from(ZEROS),
        act_order=st.booleans(),
        rotated=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def run(name, M, K, N, dtype, group_size, zeros, act_order, rotated, seed):
        how = {} if rotated and not act_order else PLAIN[name]
        choice = int8fx.SCHEMES[name].choice(
            group_size=group_size, zeros=zeros, act_order=act_order, **how
        )
        bias = torch.randn(N, generator=generator(seed)) if seed % 2 else None
        check(choice, rows(M, K, dtype, seed), weight_of(N, K, dtype, seed), bias)

    run()


@each_isa
@pytest.mark.parametrize("zeros", ZEROS)
def test_the_integer_product_is_exact(isa, zeros):
    """Scales of 1 and whole numbers in x: sums of any group are exact, and so is y."""
    N, K, group = 40, 192, 64
    codes = torch.randint(0, 16, (N, K), generator=generator(), dtype=torch.uint8)
    x = torch.randint(-127, 128, (9, K), generator=generator(1)).float()
    x[:, 0] = 127  # so that the row's scale is 1
    scale, zero_point = torch.ones(N, K // group), None
    if zeros != "middle":
        zero_point = torch.randint(-7, 8, (N, K // group), generator=generator(2)).float()
    if zeros == "integer":
        zero_point = zero_point.abs().to(torch.uint8)
    stored = from_codes(codes, scale, zero_point, None, 4, group, zeros)
    w_hat = grouped(4, group, zeros).dequantize(stored, N, K)
    packed = layout.pack(stored[0])
    how, rest = (group, zeros), (packed, scale, zero_point)
    y = ops.grouped_linear(x, *how, 64, "none", *rest, None, None, None)
    assert torch.equal(y, x @ w_hat.t())
    assert torch.equal(ops.grouped_float_linear(x, *how, *rest, None), y)


@each_isa
@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_depends_on_itself_alone(isa, name, dtype):
    x, weight = rows(41, 320, dtype), weight_of(100, 320, dtype)
    choice = int8fx.SCHEMES[name].choice()
    packed = choice.quantize(weight)
    y = choice.lower(eagerly, x, packed, None)
    for part in (slice(0, 1), slice(3, 8), slice(20, 41)):
        assert torch.equal(choice.lower(eagerly, x[part], packed, None), y[part])


@each_isa
def test_rows_are_quantised_as_the_reference_has_it(isa):
    """Bit for bit: with a code of 1 more than zero, a channel picks out a rotated element."""
    K = 64
    x = rows(5, K)
    codes = torch.full((K, K), 8, dtype=torch.uint8) + torch.eye(K, dtype=torch.uint8)
    stored = from_codes(codes, torch.ones(K, K // 16), None, None, 4, 16)
    nothing = torch.empty(0, dtype=torch.int32)
    x_int8, x_scale, *_ = ops.quantize_rotated_reference(x, nothing, 0.0, 64, "hadamard")
    parts = layout.pack(stored[0]), stored[1], None, None, None
    y = ops.grouped_linear(x, 16, "middle", 64, "hadamard", *parts, None)
    assert torch.equal(y, x_int8.float() * x_scale.unsqueeze(1))


def test_a_rotated_weight_stands_for_the_weight():
    """Rotated back it is within the steps of the rotated one, and columns are what they were."""
    weight, columns = weight_of(24, 128), (3, 77)
    choice = int8fx.SCHEMES["w4a8-group"].choice(columns=columns, group_size=16)
    kept = choice.weight_format
    stored = kept.quantize(weight)
    w_hat = kept.dequantize(stored, 24, 128)
    assert torch.equal(w_hat[:, columns], weight[:, columns])
    rest = weight.index_fill(1, torch.tensor(columns), 0)
    off = rotate_weight(w_hat.index_fill(1, torch.tensor(columns), 0) - rest, 64, "hadamard")
    steps = stored[1].repeat_interleave(16, 1)
    # The rotation back leaves the columns something, which is taken out: less than a step each.
    assert (off.abs() <= steps * 2 + rotation_error(rest, 64, "hadamard")).all()
    assert (w_hat - weight).norm() < 0.09 * weight.norm()


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 24}, "group must be a multiple of 16, or -1, and is 24"),
        ({"zeros": "none"}, "zeros must be middle, integer, float or offset, and is none"),
        ({"zeros": "float"}, "zero_point must be given but where zeros is middle"),
        ({"scale": torch.ones(16, 3)}, r"scale must be float32, bfloat16 or float16 \[N, 2\]"),
        ({"scale": torch.ones(16, 2).double()}, "scale must be float32"),
        ({"packed": torch.zeros(1, 256, dtype=torch.uint8)}, r"packed from 4-bit codes \[16, 64\]"),
        ({"bias": torch.ones(15)}, "bias must hold one value per output channel"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
    ],
)
def test_bad_operands_are_refused(change, message):
    given = {
        "x": torch.ones(2, 64),
        "group": 32,
        "zeros": "middle",
        "packed": torch.zeros(1, 512, dtype=torch.uint8),
        "scale": torch.ones(16, 2),
        "zero_point": None,
        "bias": None,
    } | change
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_float_linear(*given.values())
    x, group, zeros, packed, scale, zero_point, bias = given.values()
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_linear(x, group, zeros, 64, "none", packed, scale, zero_point, None, None, bias)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 24}, ["'group_size'", "24", "a multiple of 16, or -1"]),
        ({"zeros": "none"}, ["'zeros'", "'none'", "'middle' or 'integer'"]),
        ({"act_order": 1}, ["'act_order'", "1", "type bool"]),
        ({"bits": 4}, ["'bits'", "'w4a8-group' reads"]),
        ({"act_order": True}, ["act_order=True with rotation='hadamard'", "rotation='none'"]),
        ({"rotation": "convrot", "block": 32}, ["block=32", "16, 64, 256"]),
    ],
)
def test_bad_settings_are_named(options, words):
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"allowed|reads") as raised:
        int8fx.quantize_(model, scheme="w4a8-group", **options)
    assert [word for word in words if word not in str(raised.value)] == []
