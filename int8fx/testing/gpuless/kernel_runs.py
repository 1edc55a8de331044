"""Single GPU kernels, launched with poisoned memory around their operands, and what is due of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8fx.kernels.gpu.columns import candidate_rows, outlier_columns_reference
from int8fx.kernels.gpu.configs import COUNTERS, extended_tiles, product_tiles
from int8fx.kernels.gpu.decode import (
    decode_kernel,
    quantized_linear_reference,
    sum_of_parts,
    tile_rows,
)
from int8fx.kernels.gpu.gather import (
    launch_shape,
    programs,
    quantize_gather_kernel,
    quantize_gather_reference,
    x_capacity,
)
from int8fx.kernels.gpu.gemm import gemm_kernel, gemm_reference
from int8fx.kernels.gpu.groups import padded
from int8fx.kernels.gpu.norm import (
    norm_kernel,
    norm_shape,
    norm_statistics,
    normalized_reference,
)
from int8fx.kernels.gpu.residues import RESIDUES
from int8fx.kernels.gpu.rows import chunks_of_row
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.where import launchable
from int8fx.testing.nogpu.guard import assert_intact, poisoned, poisoned_like

THRESHOLD = 6.0
# Of the result's dtype: half a unit in the last place, and fp32 sums in another order.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
EPS = 1e-5


@dataclass
class Case:
    """An activation with outliers in a drawn share of its columns, and one to three linears."""

    x: Tensor
    weights: list[Tensor]
    w_scales: list[Tensor]
    biases: list[Tensor]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        biases = self.biases or self.w_scales
        return (*padded(self.weights), *padded(self.w_scales), *padded(biases))

    @property
    def N(self) -> tuple[int, int, int]:
        return padded([weight.shape[0] for weight in self.weights], absent=0)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x, *self.weights, *self.w_scales, *self.biases)

    def expected(self, decomposition: str, threshold: float = THRESHOLD) -> list[Tensor]:
        biases = self.biases or [None] * len(self.weights)
        return [
            quantized_linear_reference(self.x.clone(), threshold, decomposition, *operands)
            for operands in zip(self.weights, self.w_scales, biases, strict=True)
        ]


def candidates_as_found(x: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Candidate rows where there have to be some, and leftovers of any kind elsewhere."""
    M, K = x.shape
    leftovers = torch.tensor([-1, 0, M - 1, M, 2**15 - 1], dtype=torch.int16).repeat(2 * K)
    candidates = leftovers[: 2 * K].view(2, K).clone()
    columns = outlier_columns_reference(x, threshold)
    candidates[0, columns] = candidate_rows(x, threshold)[0, columns].to(torch.int16)
    return poisoned(candidates)


def run_quantize_gather(
    case: Case,
    threshold: float = THRESHOLD,
    quantizes: bool = True,
    norm: "Normed | None" = None,
    room: int | None = None,
    **blocks: int,
) -> dict[str, Tensor]:
    """``room``: for how many columns in ``w_gathered``; None: for all."""
    x = case.x
    M, K = x.shape
    kind = norm.kind if norm else ""
    widths = [weight.shape[0] for weight in case.weights]
    shape = launch_shape(M, K, sum(widths), x.dtype, kind) | blocks
    if "CHUNK" in blocks:
        chunks = chunks_of_row(K, shape["CHUNK"])
        shape |= chunks | ({"CHUNKS": 0} if blocks.get("CHUNKS") == 0 else {})
    shape.pop("num_warps")
    capacity = x_capacity(K)
    room = min(capacity, room or capacity)
    outputs = {
        "x_int8": torch.empty(M, K, dtype=torch.int8),
        "x_scale": torch.empty(M),
        "x_gathered": torch.empty(M, capacity, dtype=x.dtype),
        "w_gathered": torch.empty(sum(case.N), room, dtype=x.dtype),
        "columns": torch.empty(K, dtype=torch.int32),
        "count": torch.empty(1, dtype=torch.int32),
        "counters": torch.empty(COUNTERS, dtype=torch.int32),
    }
    outputs = {name: poisoned_like(tensor) for name, tensor in outputs.items()}
    launchable(quantize_gather_kernel)[(programs(shape, M, widths, quantizes),)](
        x,
        candidates_as_found(norm.h if norm else x, threshold),
        *(norm.operands if norm else (None, None, None)),
        *padded(case.weights),
        *outputs.values(),
        M,
        *case.N,
        K,
        capacity,
        room,
        threshold,
        NORM=kind,
        QUANTIZE=quantizes,
        **shape,
    )
    assert_intact(*outputs.values(), *case.inputs)
    assert not outputs["counters"].any()
    return outputs


@dataclass
class Normed:
    """A norm of a case's x, and its result.

    Attributes:
        operands: as the kernel that gathers takes them.
    """

    kind: str
    statistics: Tensor
    weight: Tensor
    bias: Tensor | None
    h: Tensor

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.statistics, self.weight, self.bias


def normed(case: Case, kind: str) -> Normed:
    """Weights of some channels are large, so that there are outliers where x has none, too. All are
    powers of two: a product is exact, and a fused addition to it is what an addition is."""
    K, dtype = case.x.shape[1], case.x.dtype
    generator = torch.Generator().manual_seed(K)
    weight = poisoned(2.0 ** torch.randint(-2, 4, (K,), generator=generator).to(dtype))
    bias = poisoned(torch.randn(K, generator=generator).to(dtype)) if kind.endswith("bias") else None
    mean, rstd = norm_statistics(case.x.clone(), kind, EPS)
    h = normalized_reference(case.x.clone(), mean, rstd, weight, bias, kind)
    return Normed(kind, poisoned(torch.cat([rstd.t(), mean.t()])), weight, bias, h)


def run_norm(
    x: Tensor,
    norm: Normed,
    addend: Tensor | None = None,
    quantizes: bool = True,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Candidate rows are -1 where nothing was written."""
    M, K = x.shape
    made = {
        "sum": torch.empty_like(x) if addend is not None else None,
        "statistics": torch.empty(2, M),
        "candidate_rows": torch.empty(K, dtype=torch.int16),
        "x_int8": torch.empty(M, K, dtype=torch.int8) if quantizes else None,
        "x_scale": torch.empty(M) if quantizes else None,
    }
    made = {name: None if one is None else poisoned_like(one) for name, one in made.items()}
    made["candidate_rows"].fill_(-1)
    shape = norm_shape(x) | (chunks_of_row(K, chunk) if chunk else {})
    shape.pop("num_warps")
    launchable(norm_kernel)[(M,)](
        x, addend, made["sum"], norm.weight, norm.bias, made["statistics"], made["candidate_rows"],
        made["x_int8"], made["x_scale"], M, K, EPS, THRESHOLD,
        NORM=norm.kind, ADDS=addend is not None, QUANTIZE=quantizes, **shape,
    )  # fmt: skip
    made = {name: one for name, one in made.items() if one is not None}
    assert_intact(x, *made.values(), *(one for one in (addend, *norm.operands) if one is not None))
    return made


def check_product(
    case: Case,
    unroll: int = 1,
    parts: int = 1,
    extra_m: int = 0,
    processors: int = 1,
    block_n: int = 32,
    room: int | None = None,
) -> tuple[int, int]:
    """How many of its tiles were extended, and how many were plain."""
    M, K = case.x.shape
    outputs = [poisoned_like(torch.empty(M, N, dtype=case.x.dtype)) for N in case.N if N]
    operands = run_quantize_gather(case, room=room)
    counters = operands.pop("counters")
    block = 32
    shape = M, sum(-(-N // block_n) for N in case.N), processors, block, extra_m
    tiles = product_tiles(*shape)
    partial = poisoned_like(torch.empty(parts, sum(tiles), block, block_n))
    launchable(gemm_kernel)[(sum(tiles), parts)](
        *operands.values(),
        partial,
        counters,
        *case.pointers,
        *padded(outputs),
        M,
        *case.N,
        K,
        operands["x_gathered"].shape[1],
        operands["w_gathered"].shape[1],
        extended_tiles(*shape),
        BLOCK_M=block,
        BLOCK_N=block_n,
        BLOCK_K=block,
        EXTRA_M=extra_m,
        SPLIT_K=parts,
        GROUP_M=2,
        UNROLL=unroll,
        GROUPED=len(outputs) > 1,
        EVEN_K=K % (block * unroll) == 0,
        HAS_BIAS=bool(case.biases),
        HAS_OUTLIERS=True,
        PRECISION="ieee",
    )
    assert_intact(*outputs, *case.inputs, *operands.values(), partial, counters)
    assert not counters.any()  # as whoever replays the launch needs them
    x_int8, x_scale, x_gathered, _, _ = quantize_gather_reference(
        case.x.clone(), case.weights, THRESHOLD
    )
    columns = outlier_columns_reference(case.x, THRESHOLD)
    biases = case.biases or [None] * len(outputs)
    for y, w_int8, w_scale, bias in zip(outputs, case.weights, case.w_scales, biases, strict=True):
        w_gathered = w_int8[:, columns]
        expected = gemm_reference(x_int8, x_scale, x_gathered, w_gathered, w_int8, w_scale, bias)
        assert relative_error(y, expected) < TOLERANCE[y.dtype]
    return tiles


def run_decode(
    case: Case, parts: int, threshold: float, sums: bool = False, **constants
) -> list[Tensor]:
    """``y`` of each linear."""
    M, K = case.x.shape
    sums = sums and parts > 1
    whole = parts == 1 or sums
    shape, dtype = ((M,), case.x.dtype) if whole else ((parts, M), torch.float32)
    outputs = [poisoned_like(torch.empty(*shape, N, dtype=dtype)) for N in case.N if N]
    taken, columns = torch.empty(K, dtype=torch.int8), torch.empty(K, dtype=torch.int32)
    given = [constants.pop(name) for name in ("x_int8", "x_scale", "residues", "residue_scale")]
    x_int8, x_scale, residues, residue_scale = given
    tiles, block_m = sum(-(-N // 16) for N in case.N), tile_rows(M, len(residues))
    counters = poisoned(torch.zeros(4 * tiles, dtype=torch.int8))
    partial = torch.empty(parts, tiles, block_m // (1 + len(residues)), 16)
    work = [poisoned_like(taken), poisoned_like(columns), poisoned_like(partial), counters]
    launchable(decode_kernel)[(tiles, parts)](
        case.x,
        x_int8,
        x_scale,
        *(residues or [x_int8] * RESIDUES),
        residue_scale,
        *work,
        *case.pointers,
        *padded(outputs),
        M,
        *case.N,
        K,
        threshold,
        BLOCK_N=16,
        BLOCK_K=32,
        SPLIT_K=parts,
        SUMS=sums,
        SCAN_BLOCK=64,
        VECTOR=4,
        QUANTIZE_BLOCK=32,
        LIST_BLOCK=4,
        GROUPED=len(outputs) > 1,
        EVEN_K=K % 32 == 0,
        HAS_BIAS=bool(case.biases) and whole,
        PRECISION="ieee",
        RESIDUES=len(residues),
        BLOCK_M=block_m,
        **constants,
    )
    assert_intact(*outputs, *work, x_int8, x_scale, *residues, residue_scale, *case.inputs)
    assert not counters.any()  # as whoever replays the launch needs them
    if whole:
        return outputs
    biases = case.biases or [None] * len(outputs)
    return [sum_of_parts(y, bias, case.x.dtype) for y, bias in zip(outputs, biases, strict=True)]
