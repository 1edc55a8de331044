"""Rows by expert: which rows of a mixture of experts a program takes, asked on the device.

Rows are side by side for each expert, and ``ends [E]`` says where those of each expert end. Those from
``ends[E - 1]`` on have no expert: for what follows they are the rows of one more, number E. How many
tiles of BLOCK_M rows an expert has depends on the data, how many there are at most does not::

    Σ_e ceil(rows_e / BLOCK_M)  <=  min(ceil(S / BLOCK_M) + E, S)        e = 0 ... E

so that is the grid, and each program finds its expert by a running sum over E numbers. Programs that
are left over have nothing to do. No count crosses to the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def tiles(S: int, E: int, block_m: int) -> int:
    """How many tiles S rows can make, by the formula above."""
    return torch.sym_min(-(-S // block_m) + E, S)


def block_of_experts(E: int) -> int:
    """BLOCK_E of ``rows_of_tile``."""
    return triton.next_power_of_2(E + 1)


def sort_rows(experts: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """The rows in the order of their experts.

    Args:
        experts: ``[S]`` integers. A negative one counts from the end, as an index does. Those that are
            not there, E among them, stand for no expert.

    Returns:
        ``order [S]``, which row comes where, and ``ends [E]`` int32.
    """
    experts = torch.where(experts < 0, experts + E, experts)
    experts = torch.where((experts < 0) | (experts > E), E, experts)
    order = torch.sort(experts, stable=True).indices
    # A sum over all rows for each expert: what Inductor makes of it is one small kernel.
    up_to = experts.unsqueeze(0) <= torch.arange(E, device=experts.device).unsqueeze(1)
    return order, up_to.sum(-1, dtype=torch.int32)


def order_of(experts: Tensor | None, ends: Tensor | None, E: int) -> tuple[Tensor | None, Tensor]:
    """``sort_rows``; the order is None where ``ends`` are given, since rows come sorted."""
    if ends is not None:
        return None, ends
    assert experts is not None
    return sort_rows(experts, E)


def experts_of_rows(ends: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """For each of S sorted rows its expert and the first row of that expert, ``[S]`` each.

    As sums over all experts: Inductor gives these a small kernel of their own, where it would repeat
    a binary search for every element of what reads its result.
    """
    row = torch.arange(S, device=ends.device).unsqueeze(1)
    started = ends.unsqueeze(0) <= row
    return started.sum(-1), torch.where(started, ends, 0).amax(-1)


@triton.jit
def rows_of_expert(ends_ptr, expert, S):
    """``first, last`` of the rows of one expert."""
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    last = tl.load(ends_ptr + expert).to(tl.int32)
    return tl.minimum(first, S), tl.minimum(last, S)


@triton.jit
def rows_of_tile(tile, ends_ptr, S, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of one tile ``expert, start, first, last``.

    Its rows are BLOCK_M from ``first`` on, but none from ``last`` on; ``start`` is the first row of its
    expert. A tile that is left over has an expert above E.
    """
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + expert, mask=expert < E, other=S).to(tl.int32)
    before = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert <= E), other=0).to(tl.int32)
    end, before = tl.minimum(end, S), tl.minimum(before, S)
    count = tl.where(expert <= E, tl.maximum(end - before, 0), 0)
    height = tl.cdiv(count, BLOCK_M)
    after = tl.cumsum(height, 0)
    found = tl.sum((after <= tile).to(tl.int32), 0)
    is_found = expert == found
    start = tl.sum(tl.where(is_found, before, 0), 0)
    last = tl.sum(tl.where(is_found, end, 0), 0)
    tiles_before = tl.sum(tl.where(is_found, after - height, 0), 0)
    return found, start, start + (tile - tiles_before) * BLOCK_M, last
