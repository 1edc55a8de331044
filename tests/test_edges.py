"""Numbers at the edges: every scheme on every instruction set, within a bound that is derived.

The bound is that of a right result: fp32 round-off of sums, the rounding to the result's dtype, and its
subnormals' spacing. Three things are allowed besides, each where it can happen alone:

- An fp32 sum over x̂ and the integers of the weight, before the weight's scale, overflows where it is
  above the largest float, and so does the sum of a channel's weights, which a zero point meets. The
  result is then not finite, and never a wrong number.
- AVX512-BF16's instruction takes subnormal operands and sums for 0: 2^-126 for each x and each sum.
- A library's product in 16-bit may do the same; those of ``BY_A_LIBRARY`` are such.
"""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import int8fx
from int8fx.kernels import table
from int8fx.kernels.cpu import int8_linear as cpu
from int8fx.kernels.formats.int8 import PER_CHANNEL
from int8fx.kernels.ops import int8_linear as ops
from int8fx.kernels.ops.quantize_reference import EVERYTHING
from int8fx.kernels.schemes.scheme import eagerly
from int8fx.testing.bounds import FP32

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no CPU kernel: {REASON}")
ISAS = cpu.isas() if REASON is None else []
each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

K, N, ROWS = 96, 32, 3
LEAST_NORMAL = 2.0**-126
# Multiplied by torch, of the de-quantised weight.
BY_A_LIBRARY = ("w8a16-group", "wna16-group", "nf4")
QMAX = 127


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def one_in_zeros(value: float, rows: int) -> Tensor:
    rest = torch.zeros(rows, K, dtype=torch.float64)
    rest[:, 5] = value
    return rest


def least(info: torch.finfo) -> float:
    return info.tiny * info.eps


# Rows [*, K] in float64, of numbers that the dtype holds.
KINDS = {
    "ordinary": lambda info, rows: random(rows, K),
    "subnormal": lambda info, rows: random(rows, K).clamp(-4, 4) * info.tiny / 5,
    "the least among zeros": lambda info, rows: one_in_zeros(least(info), rows),
    "normal, and subnormal over 127": lambda info, rows: random(rows, K).clamp(-4, 4) * info.tiny * 8,
    "the largest": lambda info, rows: random(rows, K).sign() * info.max,
    "the largest among zeros": lambda info, rows: one_in_zeros(info.max, rows),
    "the largest beside subnormal": lambda info, rows: (
        one_in_zeros(info.max, rows) + random(rows, K) * info.tiny / 8
    ),
    "large, within every sum": lambda info, rows: (
        random(rows, K).clamp(-4, 4) * min(info.max, 2.0**110) / 8
    ),
    "signed zeros": lambda info, rows: random(rows, K).sign() * 0.0,
    "zeros": lambda info, rows: torch.zeros(rows, K, dtype=torch.float64),
}


def rows_of(kind: str, dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    if kind == "all kinds":
        return torch.cat([rows_of(each, dtype, 1) for each in KINDS])
    return KINDS[kind](torch.finfo(dtype), rows).to(dtype)


def weight_of(dtype: torch.dtype) -> Tensor:
    """A channel or two of every kind."""
    return torch.cat([rows_of(kind, dtype, -(-N // len(KINDS))) for kind in KINDS])[:N].contiguous()


def check(
    kind: str,
    name: str,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    settings: Any,
    bf16_sums: bool = False,
) -> None:
    scheme = int8fx.SCHEMES[name]
    kept = scheme.weight_format(settings)
    w_hat = kept.dequantize(kept.quantize(weight), *weight.shape).double()
    # 127 times the scale of the largest float rounds to infinity.
    largest = torch.finfo(torch.float32).max
    x_hat = scheme.dequantized_input(x, settings).double().clamp(-largest, largest)
    expected = x_hat @ w_hat.t()
    # A zero point adds a number of the size of the largest to every element.
    offset = x.double().abs().amax() if "zeropoint" in name else 0.0
    sizes = x_hat.abs() + offset
    magnitude = sizes @ w_hat.abs().t()
    info = torch.finfo(x.dtype)
    bound = FP32 * (K + 16) * 4 * magnitude + least(info)
    if x.dtype != torch.float32:
        bound = bound + info.eps * magnitude
    if bf16_sums:
        # Of each x, its product with |w_int8| <= 127, and of each sum.
        steps = w_hat.abs().amax(1) + w_hat.abs().amax(1) / QMAX
        bound = bound + K * LEAST_NORMAL * steps
    if name in BY_A_LIBRARY:
        tiny = info.tiny
        bound = bound + sizes.sum(1, keepdim=True) * tiny + tiny * w_hat.abs().sum(1) + K * tiny
    w_scale = (weight.double().abs().amax(1) / QMAX).clamp_min(LEAST_NORMAL)
    before_scale = magnitude / w_scale if name not in BY_A_LIBRARY else magnitude
    overflows = (before_scale >= largest * 0.999) | (magnitude + bound >= info.max * 0.999)
    if "zeropoint" in name:  # it meets the sum of a channel's weights
        overflows |= w_hat.abs().sum(1) >= largest * 0.999
    if name in ("w4a16-group", "w4a8-group"):
        # Codes from 0 to 15 meet x before their zero point does, and the scale of the group.
        overflows |= 15 * sizes.sum(1, keepdim=True) >= largest * 0.999
    if name == "w4a8-group":
        # Sums over groups meet x_scale last; rotated elements of 32 are at most the root of 32 times w.
        overflows |= 127 * 16 * 32**0.5 * w_hat.abs().sum(1) >= largest * 0.999
        # ŵ ends at the largest float, which half a step of a rotated row may pass.
        bound = bound + 16 * sizes @ (w_hat * (w_hat.abs() >= largest)).abs().t()
        overflows |= x.double().abs().sum(1, keepdim=True) >= largest * 0.999
    if "rotated" in name:
        # ŵ ends at the largest float, which half a step of the 32 elements of a block may pass, each
        # over the root of 32; a step is at most the largest sum of the block over 127.
        clamped = (w_hat.abs() >= largest).double() * (32 / 127 / 2 * largest)
        bound = bound + sizes @ clamped.t()
        # Elements of a block are summed up before they are quantised.
        overflows |= x.double().abs().sum(1, keepdim=True) >= largest * 0.999
    error = (y.double() - expected).abs()
    wrong = ~(error <= bound) & ~(overflows & ~y.isfinite())
    assert not wrong.any(), (
        f"{kind}: {int(wrong.sum())} of {wrong.numel()}, at {wrong.nonzero()[:6].tolist()}: "
        f"{y[wrong][:3].tolist()} for {expected[wrong][:3].tolist()}, bound {bound[wrong][:3].tolist()}"
    )


def settings_of(name: str) -> list[Any]:
    settings = int8fx.SCHEMES[name].settings
    if "threshold" not in int8fx.SCHEMES[name].reads:
        return [settings()]
    return [settings(), settings(threshold=0.0), settings(decomposition="token")]


@each_isa
@each_dtype
@pytest.mark.parametrize("name", int8fx.SCHEMES)
def test_a_scheme_at_the_edges(name, dtype, isa):
    weight = weight_of(dtype)
    for settings in settings_of(name):
        choice = int8fx.SCHEMES[name].choice(**asdict(settings))
        packed = choice.quantize(weight)
        for kind in (*KINDS, "all kinds"):
            x = rows_of(kind, dtype)
            check(f"{kind}", name, x, weight, choice.lower(eagerly, x, packed, None), settings)


def one_call(x: Tensor, weight: Tensor, threshold: float, decomposition: str) -> Tensor:
    packed, w_scale = int8fx.SCHEMES["llm.int8"].choice().quantize(weight)
    return ops.int8_linears(x, threshold, decomposition, [packed], [w_scale], [])[0]


@each_isa
@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_operator_of_a_cpu_at_the_edges(rows, dtype, isa):
    weight = weight_of(dtype)
    bf16_sums = dtype == torch.bfloat16 and isa in ("avx512_vnni", "amx_int8")
    for kind in (*KINDS, "all kinds"):
        x = rows_of(kind, dtype, rows)
        for settings in settings_of("llm.int8"):
            y = one_call(x, weight, settings.threshold, settings.decomposition)
            check(kind, "llm.int8", x, weight, y, settings)
        y = one_call(x, weight, EVERYTHING, "all")
        check(kind, "w8a16", x, weight, y, int8fx.SCHEMES["w8a16"].settings(), bf16_sums)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_subnormal_rows_are_exact_in_weight_only_products(dtype, isa):
    """Integers times subnormals are subnormals: nothing is rounded before the weight's scale."""
    x = rows_of("subnormal", dtype)
    if dtype == torch.float32:
        x = x / 512  # sums stay where fp32 has no rounding
    w_int8 = torch.randint(-3, 4, (N, K), dtype=torch.int8)
    w_int8[:, 0] = 127  # so that the scale is 1
    packed, w_scale = table.pack(w_int8), torch.ones(N)
    (y,) = ops.int8_linears(x, EVERYTHING, "all", [packed], [w_scale], [])
    expected = x.double() @ w_int8.double().t()
    assert torch.equal(y, expected.to(dtype))
    assert (y != 0).any()


@each_isa
@each_dtype
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", int8fx.SCHEMES)
def test_what_is_not_finite_in_float_is_not_finite(name, value, dtype, isa):
    x, weight = rows_of("ordinary", dtype), rows_of("ordinary", dtype, N)
    x[1, 7] = value
    choice = int8fx.SCHEMES[name].choice()
    y = choice.lower(eagerly, x, choice.quantize(weight), None)
    in_float = torch.nn.functional.linear(x, weight)
    assert not y[~in_float.isfinite()].isfinite().any()
    rows_alone = not name.endswith("tensor")
    if rows_alone:
        assert y[[0, 2]].isfinite().all()


@each_dtype
def test_weights_at_the_edges_come_back_within_half_a_step(dtype):
    weight = weight_of(dtype)
    w_scale = (weight.double().abs().amax(1) / QMAX).clamp_min(LEAST_NORMAL)
    error = (
        PER_CHANNEL.dequantize(PER_CHANNEL.quantize(weight), N, K).double() - weight.double()
    ).abs()
    assert (error <= w_scale.unsqueeze(1) * (0.5 + QMAX * 2.0**-23)).all()
