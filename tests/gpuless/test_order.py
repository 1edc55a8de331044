"""Kernels whose programs share memory, with those programs side by side and in any order.

The kernels' own checks (``test_kernels.py``) run under ``nogpu/order.py``. Each guard that a kernel
relies on is taken away as well, and then some order has to make the same check fail.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from int8fx.kernels.gpu.columns import outlier_columns_reference
from int8fx.kernels.gpu.gather import quantize_gather_reference
from int8fx.kernels.gpu.residues import outlier_residues
from int8fx.kernels.ops.quantize_reference import quantize_reference, quantize_weight
from int8fx.testing.gpuless import expert_runs, grouped_runs, kernel_runs
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.gpuless.where import launched_by
from int8fx.testing.nogpu.guard import poisoned, poisoned_like
from int8fx.testing.nogpu.order import GUARDS, MissingBarrier, Stuck, simulate

SEEDS = range(12)
RESIDENT = pytest.mark.parametrize("resident", [1, 2, 5], ids="{} in flight".format)


@triton.jit
def message_kernel(data_ptr, flag_ptr, seen_ptr, BLOCK: tl.constexpr):
    """One program writes, says so, and the other reads."""
    index = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(data_ptr + index, index + 1)
        tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem="release")
    else:
        while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
            pass
        tl.store(seen_ptr + index, tl.load(data_ptr + index))


@triton.jit
def count_kernel(count_ptr, ticket_ptr):
    tl.store(ticket_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1, sem="relaxed"))


@triton.jit
def exchange_kernel(memory_ptr, y_ptr, BLOCK: tl.constexpr):
    """Threads read what others of the same program have stored."""
    index = tl.arange(0, BLOCK)
    tl.store(memory_ptr + index, index)
    tl.debug_barrier()
    tl.store(y_ptr + index, tl.load(memory_ptr + BLOCK - 1 - index))


def messages(seed: int, **given: Any) -> torch.Tensor:
    data, flag, seen = (torch.zeros(size, dtype=torch.int32) for size in (16, 1, 16))
    simulate(message_kernel, seed, **given)[(2,)](data, flag, seen, BLOCK=16)
    assert torch.equal(data, torch.arange(1, 17, dtype=torch.int32))  # the end publishes everything
    return seen


def test_what_is_released_and_acquired_arrives():
    for seed in SEEDS:
        assert messages(seed).tolist() == list(range(1, 17))


@pytest.mark.parametrize("guard", ["barriers", "release", "acquire"])
def test_without_one_of_the_three_some_of_it_does_not(guard):
    assert any(0 in messages(seed, without=[guard]).tolist() for seed in SEEDS)


def test_a_seed_gives_the_same_run():
    runs = [[messages(seed, without=["release"]).tolist() for seed in SEEDS] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({tuple(seen) for seen in runs[0]}) > 1


def test_a_program_that_waits_for_one_that_is_not_in_flight_is_stuck():
    with pytest.raises(Stuck, match="1 programs in flight, and 1 to come"):
        [messages(seed, resident=1) for seed in SEEDS]


def tickets(seed: int, **given: Any) -> list[int]:
    count, ticket = torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    simulate(count_kernel, seed, resident=3, **given)[(6,)](count, ticket)
    return ticket.tolist()


def test_programs_count_in_any_order_and_none_is_counted_twice():
    runs = [tickets(seed) for seed in SEEDS]
    assert all(sorted(run) == list(range(6)) for run in runs)
    assert len({tuple(run) for run in runs}) > 6
    assert any(sorted(tickets(seed, without=["atomics"])) != list(range(6)) for seed in SEEDS)


def test_threads_of_a_program_meet_at_a_barrier():
    memory, y = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    simulate(exchange_kernel)[(1,)](memory, y, BLOCK=16)
    assert y.tolist() == list(range(15, -1, -1))
    with pytest.raises(MissingBarrier):
        simulate(exchange_kernel, without=["barriers"])[(1,)](memory, y, BLOCK=16)


def test_what_is_asked_for_has_to_be_known():
    with pytest.raises(ValueError, match="without fences; known: barriers, atomics, release, acquire"):
        simulate(count_kernel, without=["fences"])
    with pytest.raises(ValueError, match="0 programs in flight"):
        simulate(count_kernel, resident=0)


def replayed(kernel: Any, seed: int, **given: Any) -> Any:
    """Launched once or, every other seed, twice with the same memory, as a CUDA graph does.

    Parts of sums do not outlive a launch: else the second would find what the first has left there.
    """

    class Replays:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                named = dict(zip(kernel.arg_names, args, strict=False))
                for number in range(1 + seed % 2):
                    if number and "parts_ptr" in named:
                        named["parts_ptr"].fill_(torch.nan)
                    simulate(kernel, seed + 1000 * number, **given)[grid](*args, **kwargs)

            return launch

    return Replays()


def in_order(check: Callable[[], Any], seed: int, **given: Any) -> Any:
    with launched_by(functools.partial(replayed, seed=seed, **given)):
        return check()


def linear(M: int, widths: tuple[int, ...], K: int) -> kernel_runs.Case:
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=generator)
    x[:, [3, 20]] *= 15.0
    packed = [quantize_weight(torch.randn(N, K, generator=generator)) for N in widths]
    weights, scales = [poisoned(w_int8) for w_int8, _ in packed], [poisoned(s) for _, s in packed]
    return kernel_runs.Case(poisoned(x), weights, scales, [])


def product(parts: int) -> None:
    kernel_runs.check_product(linear(5, (40,), 160), parts=parts)


def decode(parts: int, quantizes: bool) -> list[torch.Tensor]:
    """``y``, checked against the reference."""
    case = linear(2, (20, 7), 160)
    way = "column" if quantizes else "token"
    x_int8, x_scale, x_outlier, _ = quantize_reference(case.x.clone(), 6.0, way)
    fresh = poisoned_like if quantizes else poisoned
    rows = {"x_int8": fresh(x_int8), "x_scale": fresh(x_scale), "residue_scale": poisoned(x_scale)}
    residues = []
    if not quantizes:
        residues, residue_scale = outlier_residues(x_outlier)
        rows["residue_scale"] = poisoned(residue_scale)
    outputs = kernel_runs.run_decode(
        case, parts, 6.0, True, **rows, residues=[*map(poisoned, residues)], QUANTIZE=quantizes
    )
    for y, expected in zip(outputs, case.expected(way), strict=True):
        assert relative_error(y, expected) < 2 * kernel_runs.TOLERANCE[y.dtype]
    return outputs


def gathering() -> None:
    """Every program that gathers lists the columns for itself, in the same memory."""
    case = linear(37, (40,), 70)
    done = kernel_runs.run_quantize_gather(case, ROWS=2, STEPS=3, GATHER_ROWS=16)
    expected = quantize_gather_reference(case.x.clone(), case.weights, 6.0)
    assert torch.equal(done["x_int8"], expected[0])
    assert torch.equal(done["x_gathered"][:, : int(expected[-1])], expected[2])
    assert torch.equal(done["w_gathered"][:, : int(expected[-1])], expected[3])


def norms() -> None:
    """Rows store themselves as the candidate of a column, and any of them may be the one that stays."""
    case = linear(9, (), 70)
    norm = kernel_runs.normed(case, "rms")
    candidates = kernel_runs.run_norm(case.x, norm)["candidate_rows"].long()
    columns = outlier_columns_reference(norm.h, 6.0)
    assert torch.equal(candidates >= 0, columns)
    assert (norm.h[candidates[columns], columns.nonzero()[:, 0]].abs() >= 6.0).all()


def experts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 40, generator=generator)
    x[:, 7] *= 15.0
    weight = torch.randn(3, 24, 40, generator=generator)
    chosen = torch.randint(0, 3, (11,), generator=generator)
    given = expert_runs.case(x, weight, chosen, False)
    done = expert_runs.quantize(given, 6.0, "column")
    y = expert_runs.product(given, done, True)
    assert not y.isnan().any()


def groups(parts: int, in_int8: bool) -> None:
    """Whose programs count themselves, where K is split."""
    given = grouped_runs.case(2, 320, [40, 7], 32, "integer", in_int8=in_int8)
    grouped_runs.check(given, parts=parts)


CHECKS: dict[str, Callable[[], Any]] = {
    **{f"product, {parts} parts": functools.partial(product, parts) for parts in (1, 2, 3, 4)},
    **{
        f"decode, {parts} parts{', quantises' * way}": functools.partial(decode, parts, way)
        for parts in (1, 2, 4)
        for way in (False, True)
    },
    **{
        f"groups, {parts} parts{', int8' * in_int8}": functools.partial(groups, parts, in_int8)
        for parts in (1, 2, 4)
        for in_int8 in (False, True)
    },
    "gather": gathering,
    "norm": norms,
    "experts": experts,
}


@RESIDENT
@pytest.mark.parametrize("check", CHECKS)
def test_programs_in_any_order_give_the_same_result(check, resident):
    for seed in range(4):
        in_order(CHECKS[check], seed, resident=resident)


# What each kernel relies on, and so what no check may pass without.
RELIES_ON = [
    *((f"product, {parts} parts", guard) for parts in (2, 3) for guard in GUARDS),
    *(("decode, 4 parts", guard) for guard in GUARDS),
    *(("groups, 4 parts", guard) for guard in GUARDS),
    ("decode, 1 parts, quantises", "barriers"),
    ("gather", "barriers"),
]


@pytest.mark.parametrize(("check", "guard"), RELIES_ON)
def test_a_kernel_without_what_it_relies_on_fails(check, guard):
    with pytest.raises(AssertionError):
        [in_order(CHECKS[check], seed, without=[guard]) for seed in range(40)]


def test_a_sum_of_parts_is_the_same_bits_in_any_order():
    expected = decode(4, quantizes=False)
    for seed in range(4):
        outputs = in_order(functools.partial(decode, 4, False), seed, resident=5)
        assert all(map(torch.equal, outputs, expected))
        assert math.isfinite(float(outputs[0].sum()))
