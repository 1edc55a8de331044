"""The kernel of weights by groups, launched with poisoned memory around its operands."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8fx.kernels.formats.codes import pack_bits
from int8fx.kernels.formats.grouped import WHOLE
from int8fx.kernels.gpu import grouped_packing
from int8fx.kernels.gpu.grouped_configs import group_columns, step_columns
from int8fx.kernels.gpu.grouped_gemm import grouped_gemm_kernel
from int8fx.kernels.gpu.groups import padded
from int8fx.kernels.gpu.rotate import columns_room
from int8fx.testing.gpuless.where import launchable
from int8fx.testing.grouped_bound import offsets, sums_and_bound
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Weight:
    """One weight, as numbers and as the kernel takes it.

    Attributes:
        codes: ``[N, G · width]``, of 4 bits from 0 to 15 and of 8 signed.
        columns: ``[C, N]``, in the dtype of the result.
    """

    codes: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    columns: Tensor
    bias: Tensor | None


@dataclass
class Case:
    """Rows, in int8 or as they are, and one to three weights.

    Attributes:
        x: ``[SETS, M, K]``; x_scale: ``[SETS, M]``; x_columns: ``[SETS, M, ROOM]``.
        sets: which rows each weight meets.
    """

    dtype: torch.dtype
    group: int
    zeros: str
    bits: int
    x: Tensor
    x_scale: Tensor
    x_columns: Tensor
    weights: list[Weight]
    sets: list[int] = field(default_factory=lambda: [0, 0, 0])

    @property
    def N(self) -> list[int]:
        return [len(weight.scale) for weight in self.weights]

    def expected(self, number: int) -> tuple[Tensor, Tensor]:
        """Of one weight in float64, and by how much the kernel may be off it."""
        weight, own = self.weights[number], self.sets[number]
        x = self.x[own].clone()
        if x.dtype == torch.int8:
            x = x.double() * self.x_scale[own].double().unsqueeze(1)
        count = weight.columns.shape[0]
        offset = offsets(weight.scale, weight.zero, self.zeros)
        if self.bits == 8:
            offset = torch.zeros_like(offset)
        of_columns = self.x_columns[own, :, :count], weight.columns.t()
        bias = weight.bias
        parts = x, of_columns[0], weight.codes, weight.scale, offset, of_columns[1], bias
        return sums_and_bound(*parts, self.dtype)


def case(
    M: int,
    K: int,
    widths: list[int],
    group: int,
    zeros: str = "middle",
    bits: int = 4,
    dtype: torch.dtype = torch.float16,
    in_int8: bool = False,
    count: int = 0,
    has_bias: bool = False,
    sets: int = 1,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    width = K if group == WHOLE else group
    G = -(-K // width)

    def weight(N: int) -> Weight:
        low, high = (0, 16) if bits == 4 else (-127, 128)
        integers = torch.randint(low, high, (N, G * width), generator=generator)
        codes = integers.to(torch.uint8 if bits == 4 else torch.int8)
        packed = grouped_packing.pack(pack_bits(codes, 4)) if bits == 4 else codes
        zero = None
        if zeros == "integer":
            zero = torch.randint(0, 256, (N, G), generator=generator, dtype=torch.uint8)
        elif zeros != "middle":
            zero = normal(N, G)
        scale = normal(N, G).abs() + 0.1
        parts = packed, scale, normal(count, N), normal(N) if has_bias else None
        packed, scale, columns, bias = (None if each is None else poisoned(each) for each in parts)
        return Weight(codes, packed, scale, None if zero is None else poisoned(zero), columns, bias)

    x = normal(sets, M, K)
    if in_int8:
        x = torch.randint(-127, 128, (sets, M, K), generator=generator, dtype=torch.int8)
    x_columns = torch.zeros(sets, M, columns_room(count), dtype=dtype)
    x_columns[..., :count] = normal(sets, M, count)
    rows = x, (normal(sets, M, dtype=torch.float32).abs() + 0.1) / 127, x_columns
    weights = [weight(N) for N in widths]
    own = [0, 0, 0] if sets == 1 else [0, 1, 0]
    return Case(dtype, group, zeros, bits, *map(poisoned, rows), weights, own)


def run(
    given: Case, parts: int = 1, block_m: int = 16, block_n: int = 32, most: int = 64
) -> list[Tensor]:
    """``y`` of each weight; ``most``: codes of a step."""
    x, weights = given.x, given.weights
    _, M, K = x.shape
    block_k = step_columns(given.group, given.bits, most)
    outputs = [poisoned_like(torch.empty(M, N, dtype=given.dtype)) for N in given.N]
    tiles = -(-M // block_m) * sum(-(-N // block_n) for N in given.N)
    partial = poisoned_like(torch.empty(parts, tiles, block_m, block_n))
    counters = poisoned(torch.zeros(tiles, dtype=torch.int32))
    sets = poisoned(torch.tensor(given.sets, dtype=torch.int32))
    scales = [weight.scale for weight in weights]
    zeros = [weight.zero for weight in weights] if given.zeros != "middle" else scales
    count = len(weights[0].columns)
    columns = [weight.columns for weight in weights] if count else scales
    biases = [weight.bias for weight in weights] if weights[0].bias is not None else scales
    launchable(grouped_gemm_kernel)[(tiles, parts)](
        x,
        given.x_scale,
        given.x_columns,
        sets,
        partial,
        counters,
        *padded([weight.packed for weight in weights]),
        *padded(scales),
        *padded(zeros),
        *padded(columns),
        *padded(biases),
        *padded(outputs),
        M,
        *padded(given.N, absent=0),
        K,
        weights[0].packed.numel() // given.N[0],
        scales[0].shape[1],
        GROUP=group_columns(given.group),
        ZEROS=given.zeros,
        BITS=given.bits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLIT_K=parts,
        GROUP_M=2,
        GROUPED=len(weights) > 1,
        SETS=len(x) > 1,
        EVEN_K=K % block_k == 0,
        HAS_BIAS=weights[0].bias is not None,
        COLUMNS=count,
        ROOM=columns_room(count),
        PRECISION="ieee",
    )
    operands = [weight.packed for weight in weights], scales, zeros, columns, biases
    assert_intact(x, given.x_scale, given.x_columns, sets, partial, counters, *outputs)
    assert_intact(*(each for tensors in operands for each in tensors))
    assert not counters.any()  # as whoever replays the launch needs them
    return outputs


def check(given: Case, **shape: int) -> list[Tensor]:
    """Raises:
    AssertionError: an element is further from float64 than it may be.
    """
    outputs = run(given, **shape)
    for number, y in enumerate(outputs):
        expected, bound = given.expected(number)
        assert ((y.double() - expected).abs() <= bound).all()
    return outputs
