"""The kernels of rotated linears alone, inside poisoned memory, over shapes, blocks and columns.

Integers and scales are the reference's bit for bit. Here in the interpreter; ``tests/test_gpu.py`` runs
the same on a GPU.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8fx.kernels.gpu.configs import COUNTERS
from int8fx.kernels.gpu.groups import padded
from int8fx.kernels.gpu.hadamard import rotated_chunk, signs_of_columns
from int8fx.kernels.gpu.norm import NORMS, norm_statistics, normalized_reference
from int8fx.kernels.gpu.rotate import columns_room, rotate_kernel, rotate_shape
from int8fx.kernels.gpu.rotated_gemm import rotated_gemm_kernel
from int8fx.kernels.gpu.rounding import corrected_int8
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.kernels.ops.rotated_linear import quantize_rotated_reference, rotated_linear_reference
from int8fx.kernels.ops.rotation import (
    ROTATIONS,
    allowed_blocks,
    block_of,
    rotate,
    rotated_columns,
)
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.where import is_on_a_gpu, launchable
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like

EPS = 1e-5
# Of the result's dtype: half a unit in the last place, and fp32 sums in another order.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
THOROUGH = settings(max_examples=20, deadline=None, derandomize=True)
EVERY_BLOCK = [(rotation, block) for rotation in ROTATIONS for block in allowed_blocks(rotation)]


@triton.jit
def chunk_kernel(
    x_ptr, y_ptr, signs_ptr, SIZE: tl.constexpr, RANDOM: tl.constexpr, CHUNK: tl.constexpr
):
    k = 8 * tl.arange(0, CHUNK // 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(y_ptr + k, rotated_chunk(tl.load(x_ptr + k), k, SIZE, RANDOM))
    tl.store(signs_ptr + k, signs_of_columns(k, SIZE, RANDOM))


@pytest.mark.parametrize(("rotation", "block"), EVERY_BLOCK, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_chunk_is_rotated_as_the_reference_has_it(rotation, block, dtype):
    generator = torch.Generator().manual_seed(block)
    x = poisoned((torch.randn(512, generator=generator) * 100).to(dtype))
    y, signs = poisoned_like(torch.empty(512)), poisoned_like(torch.empty(512))
    random = rotation == "random-signs"
    launchable(chunk_kernel)[(1,)](x, y, signs, SIZE=block, RANDOM=random, CHUNK=512)
    assert_intact(x, y, signs)
    assert torch.equal(y, rotate(x.clone(), block, rotation))
    one = torch.zeros(512).index_fill(0, torch.arange(0, 512, block), 1.0)  # of each block the first
    assert torch.equal(signs[::block], rotate(one, block, rotation)[::block])


@triton.jit
def rounding_kernel(x_ptr, scale_ptr, y_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + tl.program_id(0))
    tl.store(y_ptr + k, corrected_int8(tl.load(x_ptr + k), scale, EXACT))


@pytest.mark.parametrize("exact", [False, True])
def test_quotients_next_to_ties_round_as_the_reference_does(exact):
    """Rows of the neighbours, in fp32, of each tie times the scale: a quotient that is a unit in the
    last place off would round to the other side."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(64, generator=generator) * 2.0 ** torch.arange(-90, 38, 2)
    ties = torch.arange(-127, 127) + 0.5
    near = ties * scale.unsqueeze(1)
    rows = torch.stack([near, near.nextafter(near.sign() * math.inf), near.nextafter(0 * near)], -1)
    x = torch.nn.functional.pad(rows.flatten(1), (0, 1024 - 3 * len(ties)))
    y = torch.empty(x.shape, dtype=torch.int8)
    launchable(rounding_kernel)[(64,)](x, scale, y, EXACT=exact, BLOCK=1024)
    expected = torch.round(x / scale.unsqueeze(1)).to(torch.int8)
    assert torch.equal(y, expected)
    plain = torch.round(x * (1 / scale).unsqueeze(1)).to(torch.int8)
    assert not torch.equal(plain, expected)  # what the correction is for


@dataclass
class Case:
    """An activation, and what is kept of it for each of one to three linears."""

    x: Tensor
    columns: list[Tensor]
    block: int
    rotation: str

    @property
    def size(self) -> int:
        return block_of(self.x.shape[1], self.block, self.rotation)

    @property
    def length(self) -> int:
        return rotated_columns(self.x.shape[1], self.block, self.rotation)

    def expected(self, h: Tensor, number: int) -> tuple[Tensor, ...]:
        """``x_int8``, ``x_scale`` and ``x_columns`` of a linear."""
        quantized = quantize_rotated_reference(h, self.columns[number], 0.0, self.block, self.rotation)
        return quantized[0], quantized[1], quantized[3]


@st.composite
def cases(draw: st.DrawFn, rows: st.SearchStrategy[int]) -> Case:
    M, K = draw(rows), draw(st.one_of(st.integers(1, 300), st.sampled_from([64, 576, 1024, 2560])))
    rotation, block = draw(st.sampled_from(EVERY_BLOCK))
    dtype, count = draw(st.sampled_from(list(TOLERANCE))), draw(st.sampled_from([0, 1, 8, 8, 17]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(M, K, generator=generator)
    x[:, torch.randint(K, (3,), generator=generator)] *= 50.0
    count = min(count, K)
    numbers = draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
    choices = [torch.randperm(K, generator=generator)[:count].sort().values for _ in range(2)]
    columns = [poisoned(choices[number].to(torch.int32)) for number in numbers]
    return Case(poisoned(x.to(dtype)), columns, block, rotation)


@dataclass
class Normed:
    """A norm of a case's x, of the sum of two tensors where there is an addend, and its result."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    addend: Tensor | None = None

    def result(self, x: Tensor) -> Tensor:
        statistics = norm_statistics(x, self.kind, EPS)
        return normalized_reference(x, *statistics, self.weight, self.bias, self.kind)


def run_rotate(case: Case, norm: Normed | None = None, looped: bool = False) -> dict[str, Tensor]:
    x, sets = case.x, len(case.columns) if len(case.columns[0]) else 1
    M, K = x.shape
    count = len(case.columns[0])
    room = columns_room(count)
    made = {
        "x_int8": torch.empty(sets, M, case.length, dtype=torch.int8),
        "x_scale": torch.empty(sets, M),
        "x_columns": torch.empty(sets, M, room, dtype=norm.weight.dtype if norm else x.dtype),
        "sets": torch.empty(3, dtype=torch.int32),
        "counters": torch.empty(COUNTERS, dtype=torch.int32),
    }
    made = {name: poisoned_like(tensor) for name, tensor in made.items()}
    shape = rotate_shape(K, case.size, x.dtype.itemsize)
    shape.pop("num_warps")
    if looped:
        shape |= {"CHUNK": 256, "CHUNKS": 0, "EVEN_K": K % 256 == 0}
    addend = norm.addend if norm else None
    total = poisoned_like(x) if addend is not None else None
    launchable(rotate_kernel)[(M, sets)](
        x,
        addend,
        total,
        norm.weight if norm else None,
        norm.bias if norm else None,
        *padded(case.columns),
        *made.values(),
        M,
        K,
        EPS,
        NORM=norm.kind if norm else "",
        ADDS=addend is not None,
        COLUMNS=count,
        ROOM=room,
        SETS=sets,
        SIZE=case.size,
        RANDOM=case.rotation == "random-signs",
        EXACT=made["x_columns"].dtype == torch.float32,
        COUNTERS=COUNTERS,
        **shape,
    )
    others = [x, *case.columns, *([] if total is None else [total, addend])]
    assert_intact(*made.values(), *others)
    assert not made["counters"].any()
    return made | ({} if total is None else {"sum": total})


def check_rotated(case: Case, made: dict[str, Tensor], h: Tensor) -> None:
    count = len(case.columns[0])
    for number, columns in enumerate(case.columns):
        own = number if count and not torch.equal(columns, case.columns[0]) else 0
        if made["x_int8"].shape[0] > 1:
            assert made["sets"][number] == own
        x_int8, x_scale, x_columns = case.expected(h, number)
        assert torch.equal(made["x_int8"][own], x_int8)
        assert torch.equal(made["x_scale"][own], x_scale)
        if count:
            assert torch.equal(made["x_columns"][own, :, :count], x_columns)
            assert not made["x_columns"][own, :, count:].any()
        elif own:
            assert torch.equal(made["x_int8"][own], poisoned_like(made["x_int8"])[own])


@THOROUGH
@given(cases(st.integers(1, 9)), st.booleans())
def test_rows_are_the_references(case, looped):
    check_rotated(case, run_rotate(case, looped=looped), case.x.clone())


@pytest.mark.parametrize("kind", NORMS)
@THOROUGH
@given(cases(st.integers(1, 5)), st.booleans())
def test_rows_of_a_norm_are_the_references(kind, case, adds):
    """Of the norm as the kernel has it: its statistics are sums in another order."""
    x, dtype = case.x.clone(), case.x.dtype
    K = x.shape[1]
    generator = torch.Generator().manual_seed(K)
    weight = poisoned(2.0 ** torch.randint(-2, 4, (K,), generator=generator).to(dtype))
    bias = poisoned(torch.randn(K, generator=generator).to(dtype)) if kind.endswith("bias") else None
    norm = Normed(kind, weight, bias)
    if adds:
        norm.addend, case.x = poisoned(x / 2), poisoned(x - x / 2)
    made = run_rotate(case, norm)
    if adds:
        x = case.x + norm.addend
        assert torch.equal(made["sum"], x)
    h = norm.result(x)
    for number, columns in enumerate(case.columns):
        own = int(made["sets"][number]) if made["x_int8"].shape[0] > 1 else 0
        x_int8, x_scale, x_columns = case.expected(h, number)
        # A unit in the last place of a statistic moves h by one, and so an integer by at most one.
        torch.testing.assert_close(made["x_scale"][own], x_scale, rtol=2 * TOLERANCE[dtype], atol=1e-30)
        assert (made["x_int8"][own].int() - x_int8.int()).abs().max() <= 1
        kept = made["x_columns"][own, :, : len(columns)]
        torch.testing.assert_close(kept, x_columns, rtol=2 * TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("in_a_column", [False, True])
def test_a_row_with_nan_or_infinity_leaves_the_others_as_they_were(value, in_a_column):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 96, generator=generator)
    columns = [poisoned(torch.tensor([7, 40], dtype=torch.int32))]
    plain = run_rotate(Case(poisoned(x), columns, 64, "hadamard"))
    x[2, 7 if in_a_column else 8] = value
    done = run_rotate(Case(poisoned(x), columns, 64, "hadamard"))
    assert torch.equal(~done["x_scale"][0].isfinite(), (torch.arange(5) == 2) & (not in_a_column))
    others = torch.arange(5) != 2
    for name in ("x_int8", "x_scale", "x_columns"):
        assert torch.equal(done[name][0, others], plain[name][0, others])
    if in_a_column:  # it is no part of what is rotated
        assert torch.equal(done["x_int8"], plain["x_int8"])
        assert not done["x_columns"][0, 2].isfinite().all()


# --- the product ----------------------------------------------------------------------------------


def run_product(
    case: Case,
    widths: list[int],
    has_bias: bool,
    parts: int,
    unroll: int,
    block_m: int,
    made: dict[str, Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel has, and the reference; ``made`` by ``run_rotate``."""
    made = made or run_rotate(case)
    M, dtype, count = case.x.shape[0], case.x.dtype, len(case.columns[0])
    widths = (widths * 3)[: len(case.columns)]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights, w_scales = zip(*(quantize_weight(normal(N, case.length)) for N in widths), strict=True)
    w_columns = [poisoned(normal(count, N).to(dtype)) for N in widths]
    biases = [poisoned(normal(N).to(dtype)) for N in widths] if has_bias else []
    weights, w_scales = [*map(poisoned, weights)], [*map(poisoned, w_scales)]
    outputs = [poisoned_like(torch.empty(M, N, dtype=dtype)) for N in widths]
    tiles = -(-M // block_m) * sum(-(-N // 32) for N in widths)
    partial = poisoned_like(torch.empty(parts * tiles * block_m * 32, dtype=torch.int32))
    launchable(rotated_gemm_kernel)[(tiles, parts)](
        made["x_int8"],
        made["x_scale"],
        made["x_columns"],
        made["sets"],
        partial,
        made["counters"],
        *padded(weights),
        *padded(w_scales),
        *padded(w_columns if count else w_scales),
        *padded(biases or w_scales),
        *padded(outputs),
        M,
        *padded(widths, absent=0),
        case.length,
        BLOCK_M=block_m,
        BLOCK_N=32,
        BLOCK_K=32,
        SPLIT_K=parts,
        GROUP_M=2,
        UNROLL=unroll,
        GROUPED=len(widths) > 1,
        SETS=count > 0 and len(widths) > 1,
        EVEN_K=case.length % (32 * unroll) == 0,
        HAS_BIAS=has_bias,
        COLUMNS=count,
        ROOM=columns_room(count),
        PRECISION="ieee",
    )
    assert_intact(*outputs, *weights, *w_scales, *w_columns, *biases, *made.values(), partial)
    assert not made["counters"].any()  # as whoever replays the launch needs them
    expected = []
    for number, weight in enumerate(weights):
        x_int8, x_scale, x_columns = case.expected(case.x.clone(), number)
        operands = weight, w_scales[number], w_columns[number], biases[number] if biases else None
        no_outliers = x_columns.new_empty(0)
        expected.append(rotated_linear_reference(x_int8, x_scale, no_outliers, x_columns, *operands))
    return outputs, expected


PRODUCTS = {
    "widths": st.lists(st.integers(1, 70), min_size=1, max_size=3),
    "has_bias": st.booleans(),
    "unroll": st.sampled_from([1, 2]),
    "block_m": st.sampled_from([16, 32]),
}


@settings(THOROUGH, max_examples=12)
@given(case=cases(st.sampled_from([1, 2, 15, 16, 17, 40])), **PRODUCTS)
def test_rotated_product(case, **shape):
    """Its parts are integers, so it is the same bits in any number of them."""
    made = run_rotate(case)
    whole, expected = run_product(case, parts=1, made=made, **shape)
    for y, reference in zip(whole, expected, strict=True):
        assert relative_error(y, reference) < TOLERANCE[y.dtype]
    if not len(case.columns[0]) and not is_on_a_gpu():  # which adds the bias in one step with a product
        assert all(map(torch.equal, whole, expected))
    for parts in (2, 3, 4):
        split, _ = run_product(case, parts=parts, made=made, **shape)
        assert all(map(torch.equal, whole, split))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    # In fp32 the interpreter's sum over columns is a BLAS's, whose order follows a row's position.
    [(torch.float16, [3, 150]), (torch.bfloat16, [3, 150]), (torch.float32, [])],
    ids=str,
)
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it(dtype, kept):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 200, generator=generator).to(dtype)
    order = torch.randperm(20, generator=generator)
    louder = x.clone()
    louder[8:] *= 100.0

    def y(rows: Tensor) -> Tensor:
        columns = [poisoned(torch.tensor(kept, dtype=torch.int32))]
        case = Case(poisoned(rows), columns, 64, "hadamard")
        return run_product(case, [50], True, parts=2, unroll=1, block_m=32)[0][0].clone()

    whole = y(x)
    assert torch.equal(y(x[order]), whole[order])
    assert torch.equal(y(louder)[:8], whole[:8])
    assert torch.equal(y(x[7:8]), whole[7:8])


def test_chunks_hold_whole_blocks_and_cover_a_row():
    for itemsize in (2, 4):
        for K in (1, 20, 64, 576, 768, 4096, 5120, 11008, 14336, 16384, 28672):
            for block in allowed_blocks("hadamard"):
                size = block_of(K, block, "hadamard")
                shape = rotate_shape(K, size, itemsize)
                length = rotated_columns(K, block, "hadamard")
                assert shape["CHUNK"] % size == 0
                assert shape["EVEN_K"] == (K % shape["CHUNK"] == 0)
                if K * itemsize > 32768:
                    assert shape["CHUNKS"] == 0
                else:
                    assert length <= shape["CHUNK"] * shape["CHUNKS"] <= max(1.35 * length, 256)
